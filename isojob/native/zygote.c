/* The zygote: one small process per pool, started from a sealed memfd with an empty environment. It
 * makes cells when the host asks and takes away what is left of them; it never sees a job.
 *
 *   host --control--> MAKE + the cell's end of a socketpair
 *
 * It keeps a copy of that end until the cell's cgroups are removed: the host's end of file means that
 * nothing of the cell is left. It ends when the host does (end of file on the control socket, or its
 * pidfd, for a fork of the host may hold the socket open), and takes every cell with it. Should it be
 * killed itself, a pipe whose write end only it has tells the parked cells to leave; running jobs may
 * finish and report. */
#include <grp.h>
#include <sched.h>
#include <poll.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "zygote.h"

#ifdef __SANITIZE_ADDRESS__
/* The test build; no leak of a process that ends is one, and looking for them needs ptrace. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "detect_leaks=0";
}
#endif

static char buffer[sizeof(struct header) + WIRE_INLINE_MAX];

static int write_self(const char *path, const char *text)
{
    cleanup_close int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd < 0 ? -1 : write_all(fd, text, strlen(text));
}

/* newuidmap and newgidmap are set-uid programs: the host runs them on us. */
static int ask_for_maps(int control, struct failure *f)
{
    struct header h;
    struct reader r;
    struct writer w;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    wire_begin(&w, buffer, sizeof(buffer), MSG_MAP);
    if (wire_send(control, &w, -1, 0) < 0 ||
        wire_receive(control, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0) <= 0 ||
        h.type != MSG_MAP)
        return fail(f, "newuidmap");
    return 0;
}

/* A host that the OOM killer is to spare (oom_score_adj below 0) does not hand that on to jobs. */
static int own_oom_score(struct failure *f)
{
    char text[16] = "";
    cleanup_close int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : fail(f, "oom_score_adj");
    if (read(fd, text, sizeof(text) - 1) < 0 || (text[0] == '-' && write_all(fd, "0", 1) < 0))
        return fail(f, "oom_score_adj");
    return 0;
}

static int own_user_namespace(const struct config *c, int control, struct failure *f)
{
    char uids[48], gids[48];
    snprintf(uids, sizeof(uids), "0 %u 1\n", getuid());
    snprintf(gids, sizeof(gids), "0 %u 1\n", getgid());
    if (unshare(CLONE_NEWUSER) < 0)
        return fail(f, "user namespace");
    if (c->mode == IDS_RANGES) {
        if (ask_for_maps(control, f) < 0)
            return -1;
        if (setgroups(0, NULL) < 0)
            return fail(f, "setgroups");
    } else {
        if (write_self("/proc/self/setgroups", "deny") < 0)
            return fail(f, "setgroups deny");
        /* Ubuntu's AppArmor restriction lets unshare pass and fails here. */
        if (write_self("/proc/self/uid_map", uids) < 0)
            return fail(f, "uid_map");
        if (write_self("/proc/self/gid_map", gids) < 0)
            return fail(f, "gid_map");
    }
    return setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0 ? fail(f, "setresuid") : 0;
}

/* Not inherited: a cell would copy what it never uses, and each of our writes would copy a page. */
int zygote_slots(struct zygote *z)
{
    size_t size = z->config.slots * sizeof(*z->slots);
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || madvise(p, size, MADV_DONTFORK) < 0)
        return -1;
    z->slots = p;
    return 0;
}

/* Ignored signals survive execve, ours and then the job's: a host that ignores SIGCHLD would leave init
 * without children to wait for. */
static int own_signals(struct failure *f)
{
    /* Not signal(): glibc keeps 32 and 33 to itself and would leave them ignored. This is struct
     * kernel_sigaction: SIG_DFL, flags, no mask. Of children only ends are of interest: one that stops
     * and goes on without end would wake init each time. execve takes the flag away. */
    static const uint64_t by_default[4], of_children[4] = {0, SA_NOCLDSTOP};
    sigset_t all;
    for (int s = 1; s <= 64; s++) {
        const uint64_t *action = s == SIGCHLD ? of_children : by_default;
        if (syscall(SYS_rt_sigaction, s, action, NULL, 8) < 0 && errno != EINVAL)
            return fail(f, "signals");
    }
    sigfillset(&all);
    if (sigprocmask(SIG_SETMASK, &all, NULL) < 0)
        return fail(f, "signals");
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? fail(f, "no_new_privs") : 0;
}

static int set_up(struct zygote *z, struct failure *f)
{
    struct header h;
    struct reader r, plan;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    if (wire_receive(z->control, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0) <= 0)
        return fail(f, "receive configuration");
    /* Not sooner: a socket that is closed with a message unread loses what we have said. */
    if (own_signals(f) < 0)
        return -1;
    if (h.type != MSG_CONFIG || nfds < 2 || wire_map(fds[0], h.length, &r) < 0 ||
        wire_map(fds[1], 0, &plan) < 0)
        return fail(f, "configuration");
    if (config_parse(&z->config, &r, fds, nfds, f) < 0)
        return -1;
    close(fds[1]);
    if (z->config.template_args)
        z->warm.config = fds[0];
    else
        close(fds[0]);
    if (zygote_slots(z) < 0)
        return fail(f, "memory");
    if (own_oom_score(f) < 0)
        return -1;
    z->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (z->proc < 0)
        return fail(f, "open /proc");
    if (z->config.mode == IDS_ROOT) {
        if (setgroups(0, NULL) < 0)
            return fail(f, "setgroups");
    } else if (own_user_namespace(&z->config, z->control, f) < 0)
        return -1;
    if (unshare(CLONE_NEWNS) < 0)
        return fail(f, "mount namespace");
    umask(0);
    if (root_build(&z->config, plan, f) < 0)
        return -1;
    munmap((void *)plan.at, (size_t)(plan.end - plan.at)); /* not for every cell to inherit */
    umask(022);
    /* Rootless, a clone would inherit the flag and its maps could no longer be written (EACCES:
     * /proc/PID belongs to global root then). Nobody but the user's own processes could trace us. */
    if (z->config.mode == IDS_ROOT && prctl(PR_SET_DUMPABLE, 0) < 0)
        return fail(f, "dumpable");
    if (zygote_watch(z) < 0)
        return fail(f, "signalfd");
    if (writable_try(z, f) < 0)
        return -1;
    if (z->config.template_args && template_start(z, f) < 0)
        return -1;
    return zygote_shed(z->config.mode) < 0 ? fail(f, "zygote's capabilities") : 0;
}

int zygote_watch(struct zygote *z)
{
    int pipefd[2];
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    z->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (z->signals < 0 || pipe2(pipefd, O_CLOEXEC) < 0)
        return -1;
    z->alive_read = pipefd[0];
    z->alive_write = pipefd[1];
    return 0;
}

/* A cell's init is gone, and with it (pid namespace) every process of the cell. */
static void retire(struct zygote *z, struct slot *s)
{
    if (!cell_remove(z, s)) {
        z->removing++;
        z->stubborn |= ++s->tries > 400;
        return;
    }
    if (s->lease >= 0)
        close(s->lease);
    s->pid = s->lost ? -3 : 0;
}

static void reap(struct zygote *z)
{
    struct signalfd_siginfo info;
    pid_t pid;
    int status;
    while (read(z->signals, &info, sizeof(info)) > 0)
        ;
    z->more = false;
    for (int n = 0; (pid = waitpid(-1, &status, WNOHANG)) > 0; n++) {
        template_reaped(z, pid);
        for (struct slot *s = z->slots; s < z->slots + z->config.slots; s++)
            if (s->pid == pid) {
                z->live--;
                s->pid = -1;
                s->lost = s->session && WIFSIGNALED(status) && z->config.mode != IDS_SINGLE;
                retire(z, s);
                break;
            }
        /* A template can make children of ours without end (CLONE_PARENT): others have their turn. */
        if ((z->more = n == 63))
            return;
    }
}

/* EBUSY: css of a dead process still being released (v1). A few milliseconds later it is not. */
static void retry_removals(struct zygote *z)
{
    z->removing = 0;
    z->stubborn = false;
    for (uint32_t i = 0; i < z->config.slots; i++)
        if (z->slots[i].pid == -1)
            retire(z, &z->slots[i]);
}

static void remove_base(const struct config *c)
{
    for (unsigned i = 0; i < c->nhier; i++)
        if (c->base_name[i])
            unlinkat(c->base_parent[i], c->base_name[i], AT_REMOVEDIR);
}

/* Whether there are any, but for sessions', which see to their own. 0: nothing is sent. */
static bool signal_cells(const struct zygote *z, int number)
{
    bool any = false;
    for (const struct slot *s = z->slots; s < z->slots + z->config.slots; s++)
        if (s->pid > 0 && !s->session && s != z->warm.slot)
            any = kill(s->pid, number) == 0 || any;
    return any;
}

static void wait_for(struct zygote *z, bool all, int64_t ns)
{
    struct pollfd p = {.fd = z->signals, .events = POLLIN};
    int64_t deadline = now_ns() + ns;
    while ((all ? z->live || z->removing || z->warm.reaper > 0 : signal_cells(z, 0)) &&
           now_ns() < deadline) {
        poll(&p, 1, z->more ? 0 : 5);
        reap(z);
        retry_removals(z);
    }
}

static void shut_down(struct zygote *z)
{
    /* Cells that the host has let go of leave by themselves, at once, and lift their CPU quotas before
     * (init.c). Those of a template would be killed with it. */
    wait_for(z, false, 50000000);
    close(z->alive_write);
    template_end(&z->warm);
    signal_cells(z, SIGKILL);
    wait_for(z, true, 8000000000);
    for (uint32_t i = 0; i < z->config.slots; i++)
        if (z->slots[i].pid > 0) /* somebody has stopped it */
            kill(z->slots[i].pid, SIGKILL);
}

static bool serve(struct zygote *z)
{
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    /* Then look at the dead again; and a template makes one cell at a time. */
    for (int i = 0; i < 16 && !z->warm.pending; i++) {
        int n = wire_receive(z->control, buffer, sizeof(buffer), &h, &r, fds, &nfds, MSG_DONTWAIT);
        if (n == 0)
            return false;
        if (n < 0) {
            if (errno == EAGAIN)
                return true;
            /* No descriptor was free for that request: its host end reads end of file. */
            if (errno == EBADMSG)
                continue;
            return errno != ENOTCONN && errno != ECONNRESET;
        }
        if (h.type == MSG_MAKE && (nfds == 1 || nfds == 3) && !(h.flags & FLAG_MEMFD))
            cell_make(z, fds, nfds, &r);
        else if (h.type == MSG_SESSION && nfds == 1 && !z->session && !z->config.template_args &&
                 !(h.flags & FLAG_MEMFD))
            session_make(z, fds[0], &r);
        else if (h.type == MSG_BRANCH && nfds == 1 && z->config.template_args &&
                 !(h.flags & FLAG_MEMFD))
            template_branch(z, fds[0], &r);
        else
            for (unsigned k = 0; k < nfds; k++)
                close(fds[k]);
    }
    return true;
}

static void serve_all(struct zygote *z)
{
    enum { CONTROL, SIGNALS, HOST, PARENT, TEMPLATES };
    const bool warm = z->config.template_args;
    struct pollfd p[TEMPLATES + TEMPLATE_POLLS];
    for (;;) {
        /* While a template makes a cell, the control socket holds what else is wanted. */
        p[CONTROL] = (struct pollfd){.fd = z->control, .events = z->warm.pending ? 0 : POLLIN};
        p[SIGNALS] = (struct pollfd){.fd = z->signals, .events = POLLIN};
        p[HOST] = (struct pollfd){.fd = z->config.host, .events = POLLIN};
        p[PARENT] = (struct pollfd){.fd = z->parent};
        if (warm)
            template_poll(&z->warm, p + TEMPLATES);
        /* One that takes more than two seconds has a process in uninterruptible sleep. */
        int patience = z->removing ? z->stubborn ? 500 : 5 : z->warm.pending ? 500 : -1;
        if (z->more)
            patience = 0;
        int ready = poll(p, warm ? ARRAY_LEN(p) : TEMPLATES, patience);
        if (ready < 0 && errno != EINTR)
            return;
        if (ready == 0 || z->removing)
            retry_removals(z);
        if (p[SIGNALS].revents || z->more)
            reap(z);
        if (p[HOST].revents || p[PARENT].revents || (p[CONTROL].revents & POLLHUP))
            return;
        if (warm)
            template_serve(z, p + TEMPLATES);
        if (p[CONTROL].revents && !serve(z))
            return;
    }
}

void zygote_run(struct zygote *z)
{
    struct writer w;
    bool told = z->config.template_args; /* by the template */
    if (!z->slots)
        return; /* never: clang-tidy loses sight of them */
    if (!told) {
        wire_begin(&w, buffer, sizeof(buffer), MSG_READY);
        wire_put_u64(&w, TAG_PID, (uint64_t)getpid());
        told = wire_send(z->control, &w, -1, MSG_DONTWAIT) == 0;
    }
    if (told)
        serve_all(z);
    shut_down(z);
}

int main(int argc, char **argv)
{
    static struct zygote z = {.proc = -1,
                              .signals = -1,
                              .parent = -1,
                              .warm = {.program = -1, .config = -1, .hello = -1}};
    struct failure f = {0};
    struct rlimit limit;
    bool is_init = argc == 4 && !strcmp(argv[1], "init");
    if (is_init)
        z.control = (int)strtol(argv[2], NULL, 10);
    else if (argc != 2 || (z.control = (int)strtol(argv[1], NULL, 10)) < 3) {
        static const char usage[] = "isojob-zygote is started by isojob, not by hand\n";
        return write(2, usage, sizeof(usage) - 1) < 0 ? 2 : 1;
    }
    fcntl(z.control, F_SETFD, FD_CLOEXEC);
    if (is_init) {
        if (own_signals(&f) < 0)
            _exit(1);
        init_execute(z.control, (int)strtol(argv[3], NULL, 10));
    }
    /* Not the number of the descriptor we were started from. */
    prctl(PR_SET_NAME, "isojob-zygote");
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (set_up(&z, &f) < 0) {
        report_error(z.control, &f);
        remove_base(&z.config);
        return 1;
    }
    zygote_run(&z);
    remove_base(&z.config);
    return 0;
}
