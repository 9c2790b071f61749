/* A template: a warm interpreter, that the launchers of this zygote's cells are forked from. It runs
 * what the host preloads, code that nobody has to trust with the host: without capabilities, as ids of
 * its own, under limits and a filter, in namespaces of its own but for the user namespace, which has
 * to be the parent of its cells'.
 *
 *   zygote --FORK + a socket--> template: clones pid 1 of a cell as a child of the zygote
 *                               (CLONE_PARENT), which forks the launcher and executes init
 *   init --HELLO--> zygote: writes its maps, and sends what the cell is made of (handover.c)
 *
 * It never sees a lease, a cgroup or a job. Its pid namespace has a pid 1 of ours that does nothing;
 * with it dies everything that came from the template. */
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "zygote.h"

#define PATIENCE_NS (10 * (int64_t)1000000000)
#define TEMPLATE_CELL UINT32_MAX /* its cgroup's number; the host's own begin at 0 */

/* What it is executed with, by number; isojob/_warm/runner.py knows them. */
enum { FD_REQUESTS = 3, FD_PROGRAM = 4, FD_CONFIG = 5 };

static char message_buffer[1024];

static void drop(int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        close_fd(&fds[i]);
}

/* What cgroup_open() has opened. */
static void drop_cgroups(struct cell *cell)
{
    drop(cell->limit_fd, MAX_CG_FILES);
    drop(cell->evidence_fd, MAX_CG_FILES);
    drop(cell->attach_fd, MAX_HIERARCHIES);
    drop(&cell->oom, 1);
    drop(&cell->kill_fd, 1);
    drop(&cell->lift_fd, 1);
}

_Noreturn static void reaper_main(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_NAME, "isojob-reaper");
    close_all_but(NULL, 0);
    struct sigaction ignore = {.sa_handler = SIG_IGN}; /* no zombies */
    sigaction(SIGCHLD, &ignore, NULL);
    for (;;)
        pause();
}

static int own_tree(const struct config *c, struct failure *f)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) < 0)
        return fail(f, "template's namespaces");
    /* Of its own pid namespace; the cells' may be mounted only where a whole one shows. */
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return fail(f, "template's /proc");
    if (mount("isojob", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m") < 0)
        return fail(f, "template's /tmp");
    if (inside_mounts(c, f) < 0)
        return -1;
    return sethostname(c->hostname, strlen(c->hostname)) < 0 ? fail(f, "sethostname") : 0;
}

static int own_ids(const struct config *c, uint32_t slot, struct failure *f)
{
    uint32_t id = c->uid_base + 2 * slot;
    if (drop_bounding_set() < 0)
        return fail(f, "bounding set");
    if (c->mode != IDS_SINGLE && (setresgid(id, id, id) < 0 || setresuid(id, id, id) < 0))
        return fail(f, "template's ids");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || set_capabilities(0) < 0)
        return fail(f, "drop capabilities");
    for (unsigned i = 0; i < c->nrlimits; i++)
        if (set_rlimit(&c->rlimits[i], f) < 0)
            return -1;
    return 0;
}

static int place(int *fd, int target)
{
    if (dup3(*fd, target + 64, 0) < 0) /* none of the three may be in another's place */
        return -1;
    *fd = target + 64;
    return 0;
}

static int own_descriptors(struct template *t, int sock, struct failure *f)
{
    int fds[] = {sock, t->program, t->config};
    for (int i = 0; i < 3; i++)
        if (place(&fds[i], FD_REQUESTS + i) < 0)
            return fail(f, "template's descriptors");
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], FD_REQUESTS + i) < 0)
            return fail(f, "template's descriptors");
    int null = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        if (null < 0 || dup2(null, i) < 0)
            return fail(f, "template's descriptors");
    const int keep[] = {FD_REQUESTS, FD_PROGRAM, FD_CONFIG};
    close_all_but(keep, ARRAY_LEN(keep));
    return 0;
}

_Noreturn static void template_main(struct zygote *z, struct cell *cell, int sock, uint32_t slot)
{
    const struct config *c = &z->config;
    struct failure f = {0};
    sigset_t none;
    if (setsid() < 0 || join_keyring() < 0)
        fail(&f, "template's session");
    else if (cgroup_attach(cell, &f) == 0 && own_tree(c, &f) == 0 && own_ids(c, slot, &f) == 0 &&
             own_descriptors(&z->template, sock, &f) == 0) {
        sock = FD_REQUESTS;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (c->template_filter.len &&
            syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &c->template_filter) < 0)
            fail(&f, "template's filter");
        else {
            execve(c->template_argv[0], c->template_argv, c->template_envp);
            fail_at(&f, "execute", c->template_argv[0]);
        }
    }
    report_error(sock, &f);
    _exit(1);
}

static int make_namespace(struct template *t, struct failure *f)
{
    if (unshare(CLONE_NEWPID) < 0)
        return fail(f, "pid namespace");
    struct clone_args args = {.exit_signal = SIGCHLD};
    t->reaper = sys_clone3(&args);
    if (t->reaper == 0)
        reaper_main();
    return t->reaper < 0 ? fail(f, "clone reaper") : 0;
}

static int launch(struct zygote *z, struct cell *cell, struct failure *f)
{
    struct template *t = &z->template;
    struct clone_args args = {.exit_signal = SIGCHLD};
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return fail(f, "socketpair");
    t->sock = pair[0];
    t->pid = sys_clone3(&args);
    if (t->pid == 0)
        template_main(z, cell, pair[1], (uint32_t)(t->slot - z->slots));
    close(pair[1]);
    if (t->pid < 0)
        return fail(f, "clone template");
    t->slot->pid = t->pid;
    z->live++;
    return 0;
}

int template_start(struct zygote *z, struct failure *f)
{
    struct template *t = &z->template;
    const struct config *c = &z->config;
    struct cell cell;
    cell_clear(&cell, c);
    cell.warm = true;
    cell.nwrites = c->ntemplate_writes;
    memcpy(cell.writes, c->template_writes, sizeof(cell.writes));
    t->program = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (t->program < 0)
        return fail(f, "own executable");
    if (make_namespace(t, f) < 0)
        return -1;
    t->slot = free_slot(z);
    *t->slot = (struct slot){.lease = -1, .id = TEMPLATE_CELL, .mask = c->template_mask};
    int result = -1;
    if (cell_cgroups(z, t->slot, &cell, f) == 0 && cgroup_open(&cell, f) == 0)
        result = launch(z, &cell, f);
    if (result < 0)
        cell_remove(z, t->slot);
    drop(cell.dir, MAX_HIERARCHIES);
    drop_cgroups(&cell);
    return result;
}

/* The cell that was asked for will not be. */
static void give_up(struct zygote *z, const struct failure *f)
{
    struct template *t = &z->template;
    struct slot *s = t->pending;
    t->pending = NULL;
    close_fd(&t->hello); /* whatever was begun reads its end */
    drop(t->fds, t->nfds);
    t->nfds = 0;
    report_error(s->lease, f);
    if (s->pid > 0) {
        kill(s->pid, SIGKILL);
        return; /* reaped like any other */
    }
    s->pid = -1; /* what is left of its cgroups goes with the next look */
    z->removing++;
}

/* Takes all that ever came from it along; the kernel waits for each before it is dead itself. */
void template_end(struct template *t)
{
    if (t->reaper <= 0 || kill(t->reaper, SIGKILL) < 0)
        return;
    for (int i = 0; i < 200 && waitpid(t->reaper, NULL, WNOHANG) == 0; i++)
        usleep(5000);
    t->reaper = 0;
}

void template_died(struct zygote *z)
{
    struct failure f = {0};
    struct template *t = &z->template;
    t->pid = 0;
    close_fd(&t->sock);
    errno = ECHILD;
    fail(&f, "template");
    if (!t->ready)
        report_error(z->control, &f);
    if (t->pending)
        give_up(z, &f);
}

/* What the cell is sent when it says hello. Copies: the caller closes its own. */
static int prepare(struct template *t, struct cell *cell, struct failure *f)
{
    wire_begin(&t->message, message_buffer, sizeof(message_buffer), MSG_CELL);
    cell->config_fd = t->config;
    if (cell_pack(cell, true, &t->message, t->fds, &t->nfds) < 0) {
        errno = EMSGSIZE;
        t->nfds = 0;
        return fail(f, "cell");
    }
    for (unsigned i = 0; i < t->nfds; i++)
        if ((t->fds[i] = fcntl(t->fds[i], F_DUPFD_CLOEXEC, 3)) < 0) {
            t->nfds = i;
            return fail(f, "cell's descriptors");
        }
    return 0;
}

static int ask(struct template *t, struct failure *f)
{
    char buffer[64];
    struct writer w;
    int pair[2], on = 1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return fail(f, "socketpair");
    cleanup_close int theirs = pair[1];
    t->hello = pair[0];
    wire_begin(&w, buffer, sizeof(buffer), MSG_FORK);
    if (setsockopt(t->hello, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) < 0 ||
        wire_send(t->sock, &w, theirs, MSG_DONTWAIT) < 0)
        return fail(f, "template");
    return 0;
}

int template_ask(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f)
{
    struct template *t = &z->template;
    if (t->sock < 0) {
        errno = ECHILD;
        return fail(f, "template");
    }
    cell->warm = true;
    int result = cgroup_open(cell, f);
    if (result == 0 && ((result = prepare(t, cell, f)) < 0 || (result = ask(t, f)) < 0)) {
        drop(t->fds, t->nfds);
        t->nfds = 0;
        close_fd(&t->hello);
    }
    drop_cgroups(cell);
    if (result < 0)
        return -1;
    s->pid = -2;
    t->pending = s;
    t->deadline = now_ns() + PATIENCE_NS;
    return 0;
}

/* Who says hello; 0: nobody. The kernel vouches for the pid, and waitid for its being our child. */
static pid_t who(int sock)
{
    char text[64];
    struct iovec iov = {.iov_base = text, .iov_len = sizeof(text)};
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = sizeof(control.space)};
    siginfo_t si = {0};
    struct ucred from;
    if (recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0)
        return 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_CREDENTIALS)
        return 0;
    memcpy(&from, CMSG_DATA(c), sizeof(from));
    return from.pid > 0 && waitid(P_PID, (id_t)from.pid, &si, WEXITED | WNOHANG | WNOWAIT) == 0
               ? from.pid
               : 0;
}

void template_greet(struct zygote *z)
{
    struct failure f = {0};
    struct template *t = &z->template;
    struct slot *s = t->pending;
    pid_t pid = who(t->hello);
    if (pid > 0) {
        s->pid = pid;
        z->live++;
        if (write_maps(z, s, &f) == 0) {
            if (wire_send_fds(t->hello, &t->message, t->fds, t->nfds, MSG_DONTWAIT) == 0) {
                close_fd(&t->hello);
                drop(t->fds, t->nfds);
                t->nfds = 0;
                t->pending = NULL;
                return;
            }
            fail(&f, "send cell");
        }
    } else {
        errno = now_ns() > t->deadline ? ETIMEDOUT : ECHILD;
        fail(&f, "template");
        kill(t->pid, SIGKILL); /* it does not do what it is for */
    }
    give_up(z, &f);
}

void template_hear(struct zygote *z)
{
    static char buffer[8192], out[sizeof(buffer) + 64];
    struct template *t = &z->template;
    struct writer w;
    ssize_t n = recv(t->sock, buffer, sizeof(buffer) - 1, MSG_DONTWAIT);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN)
            close_fd(&t->sock); /* its end is told by its death */
        return;
    }
    if (t->ready)
        return; /* nothing is expected any more */
    if (n == 1 && buffer[0] == 'R') {
        t->ready = true;
        wire_begin(&w, out, sizeof(out), MSG_READY);
        wire_put_u64(&w, TAG_PID, (uint64_t)getpid());
    } else if ((size_t)n > sizeof(struct header) && !memcmp(buffer, "ISOJ", 4)) {
        /* It failed before it was an interpreter. */
        if (send(z->control, buffer, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
            return;
        return;
    } else {
        wire_begin(&w, out, sizeof(out), MSG_PRELOAD);
        wire_put(&w, TAG_TEXT, 0, buffer, (size_t)n);
    }
    wire_send(z->control, &w, -1, MSG_DONTWAIT);
}
