/* pid 1 of a cell. Makes it, forks the launcher, then waits for the first of: the job's end, a timer,
 * an OOM, a forbidden call, the host shutting the lease. It kills as a set, reads the kernel's
 * accounts, sends them and exits; the kernel then ends whatever the pid namespace still holds.
 *
 * The lease is polled without POLLIN: the job's message does not wake init. A normal run wakes it
 * once. Nothing here waits for the host, and nothing the job can hold speaks to it. */
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

#include "zygote.h"

enum cause { CAUSE_NONE, CAUSE_WALL, CAUSE_CPU, CAUSE_OOM, CAUSE_SECCOMP, CAUSE_STOP };

struct account {
    bool ended, empty; /* the main process; all of them */
    bool more; /* others may have ended, too */
    int64_t cpu_seen; /* what the CPU account said last */
    unsigned still; /* looks at it since it has moved */
    struct report report;
};

/* Ended children that are looked at before everything else is again: a job of thousands, which the kernel
 * searches for each, can end them faster than that. */
enum { REAPED_AT_ONCE = 64 };

/* channel: to be made, to the launcher that is to be forked; NULL: there is one. */
int init_equip(struct cell *cell, int channel[2], struct failure *f)
{
    sigset_t chld;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    cell->signals = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
    cell->wall = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    cell->cpu = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (cell->signals < 0 || cell->wall < 0 || cell->cpu < 0 ||
        (channel && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) < 0))
        return fail(f, "init's descriptors");
    if (join_keyring() < 0)
        return fail(f, "session keyring");
    return drop_bounding_set() < 0 ? fail(f, "bounding set") : 0;
}

static int become_init(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    int channel[2];
    char byte;
    if (cgroup_open(cell, f) < 0 || init_equip(cell, channel, f) < 0)
        return -1;
    /* Up to here nothing needs the maps, which the zygote writes meanwhile. Should it be gone, the
     * pipe's end says so, unless somebody else has come to hold that: then this does. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    ssize_t n = read(cell->go, &byte, 1);
    if (n < 0)
        return fail(f, "start init");
    if (n == 0)
        _exit(1);
    prctl(PR_SET_PDEATHSIG, 0); /* a running job's end does not wait for the zygote's */
    close_fd(&cell->go);
    /* Before our own change of uid: CLONE_INTO_CGROUP is judged by the caller's credentials. */
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (c->into) {
        args.flags = CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cell->dir[0];
    }
    cell->job = sys_clone3(&args);
    if (cell->job == 0) {
        cell->channel = channel[1];
        job_main(cell);
    }
    close(channel[1]);
    close_fd(&cell->out[0]);
    close_fd(&cell->out[1]);
    cell->channel = channel[0];
    prctl(PR_SET_NAME, "isojob-init");
    if (cell->job < 0)
        return fail(f, c->into ? "clone into cgroup" : "clone launcher");
    return init_settle(cell, f);
}

int init_settle(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    uint32_t uid = c->mode == IDS_SINGLE ? c->job_uid : 0;
    uint32_t gid = c->mode == IDS_SINGLE ? c->job_gid : 0;
    if (setresgid(gid, gid, gid) < 0 || setresuid(uid, uid, uid) < 0)
        return fail(f, "init's setresuid");
    if (inside_build(cell, f) < 0)
        return -1;
    cell->workdir = open(c->workdir, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (cell->workdir < 0)
        return fail_at(f, "open", c->workdir);
    if (unshare(CLONE_NEWCGROUP) < 0)
        return fail(f, "cgroup namespace");
    /* CAP_KILL, beyond the job's (none), makes init's scheduling and affinity untouchable by a job of the
     * same uid; reading is for collect.c. */
    if (set_capabilities(1ULL << CAP_KILL | 1ULL << CAP_DAC_READ_SEARCH) < 0)
        return fail(f, "init's capabilities");
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return fail(f, "init's dumpable flag");
    return 0;
}

static void reap(struct cell *cell, struct account *a)
{
    struct report *r = &a->report;
    struct signalfd_siginfo info;
    /* One at most is pending: signals do not queue. */
    (void)!read(cell->signals, &info, sizeof(info));
    a->more = false;
    for (int i = 0; i < REAPED_AT_ONCE; i++) {
        siginfo_t si = {0};
        struct rusage ru;
        /* __WALL: siblings made by CLONE_PARENT with another exit signal. glibc hides the call's last
         * argument. */
        if (syscall(SYS_waitid, P_ALL, 0, &si, WEXITED | WNOHANG | __WALL, &ru) < 0) {
            a->empty = errno == ECHILD;
            return;
        }
        if (si.si_pid == 0)
            return;
        /* Of a child that made us its tracer (PTRACE_TRACEME) the kernel tells stops, too, whatever the
         * options (wait_consider_task): they are no end. */
        if (si.si_code != CLD_EXITED && si.si_code != CLD_KILLED && si.si_code != CLD_DUMPED)
            continue;
        r->user_us += (int64_t)ru.ru_utime.tv_sec * 1000000 + ru.ru_utime.tv_usec;
        r->system_us += (int64_t)ru.ru_stime.tv_sec * 1000000 + ru.ru_stime.tv_usec;
        r->voluntary += ru.ru_nvcsw;
        r->involuntary += ru.ru_nivcsw;
        if (ru.ru_maxrss > r->max_rss_kib)
            r->max_rss_kib = ru.ru_maxrss;
        if (si.si_pid == cell->job) {
            a->ended = true;
            r->end_ns = now_ns();
            r->code = si.si_code;
            r->status = si.si_status;
        }
    }
    a->more = true;
}

/* As a set, and again until no child is left: everything in the namespace descends from us. */
static void kill_all(struct cell *cell, struct account *a)
{
    struct pollfd p = {.fd = cell->signals, .events = POLLIN};
    if (!a->empty)
        cgroup_lift(cell);
    while (!a->empty) {
        if (cell->kill_fd >= 0)
            (void)!pwrite(cell->kill_fd, "1", 1, 0);
        kill(-1, SIGKILL);
        do
            reap(cell, a);
        while (a->more); /* killed ones make no others */
        if (!a->empty)
            poll(&p, 1, 20);
    }
}

/* cpu_ns: what the account said when the job was killed; -1: it ended by itself. */
static void send_result(const struct cell *cell, struct report *r, int64_t cpu_ns)
{
    static char buffer[24576];
    const struct shared *s = cell->shared;
    struct writer w;
    r->state = __atomic_load_n(&s->state, __ATOMIC_ACQUIRE);
    r->received_ns = s->received_ns;
    r->start_ns = s->start_ns;
    r->cpu_base_ns = s->cpu_base_ns;
    wire_begin(&w, buffer, sizeof(buffer), MSG_RESULT);
    /* Report and counters first: without files or a failure a result has one size. */
    wire_put(&w, TAG_REPORT, 0, r, sizeof(*r));
    char *sent = buffer + w.used - sizeof(*r);
    cgroup_report(cell, r, &w);
    if (cpu_ns >= 0)
        r->cpu_end_ns = cpu_ns;
    if (r->state == JOB_FAILED) {
        int32_t error = s->failure.error;
        wire_put_string(&w, TAG_STAGE, 0, s->failure.stage);
        wire_put(&w, TAG_ERRNO, 0, &error, sizeof(error));
    }
    r->done_ns = now_ns();
    memcpy(sent, r, sizeof(*r));
    wire_send(cell->lease, &w, -1, 0);
}

_Noreturn static void finish(struct cell *cell, struct account *a, enum cause cause)
{
    /* A job that is killed ends here. What the kernel needs to take it apart, 30 ms for half a
     * gigabyte or a hundred processes, is no time the program had. */
    bool killed = !a->ended;
    int64_t end_ns = killed ? now_ns() : 0, cpu_ns = killed ? cgroup_cpu_ns(cell) : -1;
    a->report.cause = cause;
    kill_all(cell, a);
    if (killed)
        a->report.end_ns = end_ns;
    collect_files(cell);
    send_result(cell, &a->report, cpu_ns);
    /* Without it the host, woken on this CPU, waits behind our exit: 85 us instead of 8. */
    sched_yield();
    _exit(0);
}

static void check_cpu(struct cell *cell, struct account *a)
{
    const struct shared *s = cell->shared;
    uint64_t expired;
    if (read(cell->cpu, &expired, sizeof(expired)) < 0)
        return;
    int64_t used = cgroup_cpu_ns(cell);
    int64_t left = s->cpu_ns - (used - s->cpu_base_ns);
    if (used >= 0 && left <= 0)
        finish(cell, a, CAUSE_CPU);
    /* At worst all CPUs burn at once. Never less than half a millisecond: the account is brought up
     * to date by ticks and switches, not continuously. Where it has not moved for some ticks the job
     * sleeps, and is looked at less and less often. */
    a->still = used == a->cpu_seen ? a->still + 1 : 0;
    a->cpu_seen = used;
    unsigned sleepy = a->still / 32;
    int64_t least = 500000LL << (sleepy < 4 ? sleepy : 4), wait = left / s->ncpus;
    if (wait < least)
        wait = least;
    struct itimerspec t = {.it_value = {.tv_sec = wait / 1000000000, .tv_nsec = wait % 1000000000}};
    timerfd_settime(cell->cpu, 0, &t, NULL);
}

/* v1 tells of an OOM in our cgroup or in any above it, just before it picks a victim. If that is one of
 * our processes the rest is ended here: v1 has no group kill. */
static void check_oom(struct cell *cell, struct account *a)
{
    struct timespec moment = {.tv_nsec = 500000};
    a->report.ooms += cgroup_events(cell->oom);
    for (int i = 0; i < 20; i++) {
        if (cgroup_counter(cell, cell->config->oom_kills) > 0)
            finish(cell, a, CAUSE_OOM);
        nanosleep(&moment, NULL);
    }
}

static void check_listener(struct cell *cell, struct account *a)
{
    static union {
        struct seccomp_notif notification;
        char room[1024]; /* the kernel may know a longer one */
    } n;
    memset(&n, 0, sizeof(n));
    if (ioctl(cell->listener, SECCOMP_IOCTL_NOTIF_RECV, &n) < 0)
        return;
    a->report.arch = n.notification.data.arch;
    a->report.nr = n.notification.data.nr;
    finish(cell, a, CAUSE_SECCOMP);
}

/* Takes a parked cell out of use; false if its launcher has read a job already. Exact, so that the
 * host may give the job to another cell. */
static bool give_up(struct cell *cell)
{
    uint32_t *state = &cell->shared->state;
    for (uint32_t from = JOB_SETUP; from <= JOB_PARKED; from++) {
        uint32_t expected = from;
        if (__atomic_compare_exchange_n(state, &expected, JOB_FAILED, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
            return true;
    }
    return false;
}

_Noreturn static void loop(struct cell *cell)
{
    struct account a = {0};
    enum { LEASE, ALIVE, SIGNALS, WALL, CPU, OOM, LISTENER, CHANNEL, N };
    struct pollfd p[N] = {
        [LEASE] = {.fd = cell->lease, .events = POLLRDHUP},
        [ALIVE] = {.fd = cell->alive},
        [SIGNALS] = {.fd = cell->signals, .events = POLLIN},
        [WALL] = {.fd = cell->wall, .events = POLLIN},
        [CPU] = {.fd = cell->cpu, .events = POLLIN},
        [OOM] = {.fd = cell->oom, .events = POLLIN},
        [LISTENER] = {.fd = cell->listener, .events = POLLIN},
        [CHANNEL] = {.fd = cell->channel, .events = POLLIN},
    };
    for (;;) {
        if (poll(p, N, a.more ? 0 : -1) < 0)
            continue;
        /* The job's own end first: what comes with it came too late. */
        if (p[SIGNALS].revents || a.more) {
            reap(cell, &a);
            if (a.ended)
                finish(cell, &a, CAUSE_NONE);
        }
        if (p[LEASE].revents & (POLLHUP | POLLERR)) {
            cgroup_lift(cell);
            _exit(0); /* nobody listens any more; our end is the end of all */
        }
        if (p[LEASE].revents) {
            if (give_up(cell))
                _exit(0);
            finish(cell, &a, CAUSE_STOP);
        }
        if (p[ALIVE].revents) {
            if (give_up(cell)) {
                struct failure f;
                errno = EOWNERDEAD;
                fail(&f, "zygote");
                report_error(cell->lease, &f);
                _exit(0);
            }
            p[ALIVE].fd = -1; /* the job may finish and report */
        }
        if (p[CHANNEL].revents) {
            if ((p[CHANNEL].revents & POLLIN) && receive_byte(cell->channel, &cell->listener) == 0)
                p[LISTENER].fd = cell->listener;
            p[CHANNEL].fd = -1;
        }
        if (p[LISTENER].revents & POLLIN)
            check_listener(cell, &a);
        else if (p[LISTENER].revents)
            p[LISTENER].fd = -1; /* no process uses the filter any more */
        if (p[WALL].revents)
            finish(cell, &a, CAUSE_WALL);
        if (p[OOM].revents)
            check_oom(cell, &a);
        if (p[CPU].revents)
            check_cpu(cell, &a);
    }
}

_Noreturn void init_main(struct cell *cell)
{
    struct failure f = {0};
    enum { FIXED = 5, LOWER = FIXED + MAX_HIERARCHIES };
    int keep[LOWER + MAX_LOWER] = {cell->lease, cell->alive, cell->go, cell->out[0], cell->out[1]};
    memcpy(keep + FIXED, cell->dir, sizeof(cell->dir));
    memcpy(keep + LOWER, cell->lower, sizeof(cell->lower));
    if (close_all_but(keep, LOWER + cell->config->nlower) < 0)
        fail(&f, "close descriptors");
    if (f.error || become_init(cell, &f) < 0) {
        report_error(cell->lease, &f);
        _exit(1);
    }
    init_serve(cell);
}

/* What it says itself is more than what we have met. */
_Noreturn static void launcher_lost(struct cell *cell)
{
    const struct shared *s = cell->shared;
    struct failure f = {0};
    if (errno == EPIPE)
        errno = ECHILD;
    fail(&f, "launcher");
    report_error(cell->lease, s->state == JOB_FAILED ? &s->failure : &f);
    _exit(1);
}

_Noreturn void init_serve(struct cell *cell)
{
    struct failure f = {0};
    for (unsigned i = 0; i < MAX_HIERARCHIES; i++) {
        close_fd(&cell->dir[i]);
        close_fd(&cell->attach_fd[i]);
    }
    for (unsigned i = 0; i < cell->config->nlimits; i++)
        close_fd(&cell->limit_fd[i]);
    if (receive_byte(cell->channel, &cell->listener) < 0)
        launcher_lost(cell);
    if (init_shed() < 0) {
        fail(&f, "init's filter");
        report_error(cell->lease, &f);
        _exit(1);
    }
    if (write(cell->channel, "g", 1) < 0)
        launcher_lost(cell);
    if (cell->config->filter_early || !cell->config->filter_notify)
        close_fd(&cell->channel);
    loop(cell);
}
