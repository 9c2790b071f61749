/* The launcher's seccomp filter: loaded ahead of time where its own calls pass it, else last. */
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/socket.h>

#include "zygote.h"

static char thread_stack[16384] __attribute__((aligned(16)));

int load_filter(const struct config *c)
{
    unsigned flags = c->filter_notify ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0;
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &c->filter);
}

/* The listener of our filter goes to init, which records a forbidden call and kills. */
int send_byte(int sock, int fd)
{
    struct iovec iov = {.iov_base = "r", .iov_len = 1};
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    return sendmsg(sock, &msg, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

int receive_byte(int sock, int *fd)
{
    char byte;
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = &byte, .iov_len = 1};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = CMSG_LEN(sizeof(int))}; /* no room for another */
    ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
    if (n == 0)
        errno = ECHILD; /* who was to send it is dead */
    if (n != 1)
        return -1;
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    if (c && c->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(c), sizeof(int));
    return 0;
}

/* A filter that the launcher's own calls would not pass is loaded last, and its listener must still
 * reach init: a thread born before, unfiltered, with our descriptors, sends it. It ends at execve. */
static int send_listener(void *arg)
{
    struct cell *cell = arg;
    int fd;
    while ((fd = __atomic_load_n(&cell->shared->notify_fd, __ATOMIC_ACQUIRE)) == 0)
        sched_yield();
    __atomic_store_n(&cell->shared->notify_fd, send_byte(cell->channel, fd) == 0 ? -1 : -2,
                     __ATOMIC_RELEASE);
    syscall(SYS_exit, 0);
    return 0;
}

int load_late(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    if (!c->filter_notify)
        return load_filter(c) < 0 ? fail(f, "seccomp") : 0;
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    if (clone(send_listener, thread_stack + sizeof(thread_stack), flags, cell) < 0)
        return fail(f, "seccomp listener thread");
    int fd = load_filter(c);
    if (fd < 0)
        return fail(f, "seccomp");
    int32_t *slot = &cell->shared->notify_fd, state;
    __atomic_store_n(slot, fd, __ATOMIC_RELEASE);
    /* No call here: each may be forbidden by now. */
    while ((state = __atomic_load_n(slot, __ATOMIC_ACQUIRE)) > 0)
        __asm__ volatile("" ::: "memory");
    errno = EPIPE;
    return state == -1 ? 0 : fail(f, "seccomp listener");
}
