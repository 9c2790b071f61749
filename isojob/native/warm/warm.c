/* In a template, loaded by its interpreter: waits for the zygote's word and forks. Each launcher that
 * comes of it is the interpreter, warm, and returns from isojob_warm_serve() with its job.
 *
 * pid 1 of the cell is cloned first, as vfork does (it borrows our memory and we wait), forks the
 * launcher, which so is its child, and executes init. The launcher then goes on where we were. */
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <stdio.h>

#include "zygote.h"

#define PUBLIC __attribute__((visibility("default")))

#ifdef __SANITIZE_ADDRESS__
/* The test build: the runtime comes with us, into an interpreter that knows nothing of it. It keeps its
 * hands off what jobs see: signals, core dumps, the heap (bound to the C library by then). */
PUBLIC const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "verify_asan_link_order=0:detect_leaks=0:disable_coredump=0:use_sigaltstack=0:"
           "handle_segv=0:handle_sigbus=0:handle_abort=0:handle_sigill=0:handle_sigfpe=0";
}
#endif

/* Of the interpreter that has loaded us. */
extern void PyOS_BeforeFork(void);
extern void PyOS_AfterFork_Parent(void);
extern void PyOS_AfterFork_Child(void);

/* A job that has arrived; isojob/warm/runner.py has its twin. */
struct warm_job {
    char **argv, **envp;
    uint8_t *result;
    uint64_t result_size;
};

static struct config config;
static struct reader config_text; /* what it points into */
static struct reader message; /* what argv and envp point into, if it is mapped */
static int program = -1;
static char stack[65536] __attribute__((aligned(16)));
static void *launcher_begins[5];
static struct {
    int zygote, init; /* sockets: of pid 1, of the launcher */
} request;

/* What a launcher will need, as a rehearsal has shown. */
struct pages {
    void *start;
    uint64_t length, advice;
};
static struct pages hot[1024];
static unsigned nhot;

/* Gets them now, while nobody waits, and without a fault for each (MADV_POPULATE_…, 5.14). */
static void touch(void)
{
    for (unsigned i = 0; i < nhot; i++)
        madvise(hot[i].start, hot[i].length, (int)hot[i].advice);
}

/* All that it has in its new user namespace, for the execve to come: it may not be uid 0 in there. */
static int keep_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        data[i].inheritable = data[i].permitted;
    if (syscall(SYS_capset, &header, data) < 0)
        return -1;
    for (unsigned cap = 0; cap < 64; cap++)
        if ((data[cap / 32].permitted >> cap % 32 & 1) &&
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
            return -1;
    return 0;
}

/* In memory that is not ours: nothing is changed but this stack, and what fork() itself sees to. */
static int pid_one(void *arg)
{
    int channel[2];
    char sock[12], to_launcher[12];
    (void)arg;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) < 0)
        _exit(1);
    pid_t launcher = fork();
    if (launcher == 0) {
        close(channel[0]);
        request.init = channel[1];
        __builtin_longjmp(launcher_begins, 1);
    }
    const int keep[] = {program, request.zygote, channel[0]};
    if (close_all_but(keep, ARRAY_LEN(keep)) < 0 || launcher < 0 || keep_capabilities() < 0 ||
        fcntl(request.zygote, F_SETFD, 0) < 0 || fcntl(channel[0], F_SETFD, 0) < 0)
        _exit(1);
    snprintf(sock, sizeof(sock), "%d", request.zygote);
    snprintf(to_launcher, sizeof(to_launcher), "%d", channel[0]);
    char *const argv[] = {"isojob-zygote", "init", sock, to_launcher, NULL}, *const envp[] = {NULL};
    syscall(SYS_execveat, program, "", argv, envp, AT_EMPTY_PATH);
    _exit(1);
}

/* What the C library takes from the limit at execve, as it does it there. */
static void thread_stacks(void)
{
    struct rlimit limit;
    pthread_attr_t attributes;
    if (getrlimit(RLIMIT_STACK, &limit) < 0 || pthread_getattr_default_np(&attributes) != 0)
        return;
    size_t size = limit.rlim_cur == RLIM_INFINITY ? 2 << 20 : (limit.rlim_cur + 4095) & ~4095UL;
    if (pthread_attr_setstacksize(&attributes, size) == 0) /* EINVAL: too small for any */
        pthread_setattr_default_np(&attributes);
    pthread_attr_destroy(&attributes);
}

static void launcher_main(struct warm_job *out)
{
    struct failure f = {0};
    struct cell cell;
    struct job job;
    struct stat task;
    cell_clear(&cell, &config);
    cell.channel = request.init;
    cell.warm = true;
    if (cell_receive(cell.channel, &cell, &f) < 0)
        _exit(125);
    cell.shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, cell.config_fd, 0);
    if (cell.shared == MAP_FAILED)
        _exit(125);
    if (join_keyring() < 0 || drop_bounding_set() < 0) {
        fail(&f, "launcher's keyring and bounding set");
        job_fail(&cell, &f);
    }
    job_harmless(&cell);
    touch();
    umask(022); /* a preload may have another */
    /* A change of ids takes it away; execve would give it back. */
    prctl(PR_SET_DUMPABLE, 1);
    /* The first that is not our code: hooks of what was preloaded. */
    PyOS_AfterFork_Child();
    /* Two links of a directory, and one for each thread (proc_task_getattr). Another than ours, by a
     * hook, would have no filter, or even capabilities, and no execve ends it. */
    int seen = stat("/proc/self/task", &task);
    if (seen == 0)
        errno = EBUSY;
    if (seen < 0 || task.st_nlink != 3) {
        fail(&f, "threads that a preload starts in forks");
        job_fail(&cell, &f);
    }
    job_park(&cell);
    job_take(&cell, &job);
    *out = (struct warm_job){
        .argv = job.argv, .envp = job.envp, .result = job.answer, .result_size = job.answer_size};
    message = job.mapped;
    /* Names of the host, and what init would believe. */
    if (munmap((void *)config_text.at, (size_t)(config_text.end - config_text.at)) < 0 ||
        munmap(cell.shared, 4096) < 0) {
        fail(&f, "unmap");
        job_fail(&cell, &f);
    }
    close_fd(&cell.channel);
    prctl(PR_SET_NAME, "python3");
    thread_stacks();
    job_started();
}

/* Reads the configuration. 0, or an errno. */
PUBLIC int isojob_warm_open(int program_fd, int config_fd)
{
    struct failure f = {0};
    struct reader r;
    program = program_fd;
    if (wire_map(config_fd, 0, &config_text) < 0)
        return errno;
    close(config_fd);
    r = config_text;
    return config_parse(&config, &r, NULL, 0, &f) < 0 ? f.error : 0;
}

/* argv and envp have been read: the message's pages are the host's, and it may be large. */
PUBLIC void isojob_warm_forget(void)
{
    if (message.at)
        munmap((void *)message.at, (size_t)(message.end - message.at));
    message = (struct reader){0};
}

PUBLIC void isojob_warm_hot(const struct pages *ranges, unsigned n)
{
    nhot = n < ARRAY_LEN(hot) ? n : ARRAY_LEN(hot);
    if (nhot) /* else they may be at NULL */
        memcpy(hot, ranges, nhot * sizeof(hot[0]));
}

/* Another template, the zygote's child as we are. */
static pid_t fork_beside(void)
{
    /* The C library keeps the thread's id where the kernel clears it when the thread ends. */
    int *tid = NULL;
    if (prctl(PR_GET_TID_ADDRESS, &tid) < 0 || !tid)
        return (pid_t)syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    const unsigned long flags =
        CLONE_PARENT | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | (unsigned long)SIGCHLD;
#if defined(__x86_64__)
    return (pid_t)syscall(SYS_clone, flags, 0, 0, tid, 0);
#else
    return (pid_t)syscall(SYS_clone, flags, 0, 0, 0, tid);
#endif
}

static void names_of(struct reader r, struct warm_job *out)
{
    static char *names[MAX_TEMPLATE_STRINGS];
    struct field f;
    unsigned n = 0;
    while (wire_next(&r, &f) > 0 && n + 1 < MAX_TEMPLATE_STRINGS)
        if (f.tag == TAG_TEMPLATE_ARG && wire_string(&f))
            names[n++] = (char *)wire_string(&f);
    names[n] = NULL;
    *out = (struct warm_job){.argv = names};
}

/* Returns in forks alone: 1 in a launcher whose job has come, 0 in a template that is to import what
 * argv names. The template itself ends in here. */
PUBLIC int isojob_warm_serve(int requests, struct warm_job *out)
{
    static char buffer[16384];
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    const int flags = CLONE_VM | CLONE_VFORK | CLONE_PARENT | CLONE_NEWUSER | CLONE_NEWPID |
                      CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS;
    for (;;) {
        int n = wire_receive(requests, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0);
        if (n <= 0)
            _exit(0);
        if ((h.type != MSG_FORK && h.type != MSG_BRANCH) || nfds != 1)
            _exit(1);
        PyOS_BeforeFork();
        if (h.type == MSG_BRANCH) {
            if (fork_beside() == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL); /* a fork does not inherit it */
                if (dup3(fds[0], requests, O_CLOEXEC) < 0)
                    _exit(1);
                close(fds[0]);
                PyOS_AfterFork_Child();
                names_of(r, out);
                return 0;
            }
        } else {
            request.zygote = fds[0];
            if (__builtin_setjmp(launcher_begins)) {
                launcher_main(out);
                return 1;
            }
            clone(pid_one, stack + sizeof(stack), flags, NULL);
        }
        PyOS_AfterFork_Parent();
        close(fds[0]); /* whoever waits for a word of the fork sees that none will come */
    }
}
