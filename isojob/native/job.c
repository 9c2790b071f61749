/* The launcher, pid 2: our code until execve. Made harmless ahead of time (own cgroup, own uid, no
 * capability, no_new_privs, filter), it parks in recvmsg on the lease. When the job comes it applies
 * the job's own limits, writes its files, arms the timers it shares with init and turns into it. */
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/timerfd.h>

#include "zygote.h"

static char buffer[sizeof(struct header) + WIRE_INLINE_MAX];

/* Closed by execve after one byte. Without it we died before; after another one there was no execve. */
static int started = -1, told = -1;

_Noreturn void job_fail(struct cell *cell, const struct failure *f)
{
    cell->shared->failure = *f;
    __atomic_store_n(&cell->shared->state, JOB_FAILED, __ATOMIC_RELEASE);
    (void)!(told >= 0 && write(told, "", 1)); /* last: a filter may end us for it */
    _exit(125);
}

static int keep_only(const struct cell *cell)
{
    const struct config *c = cell->config;
    int keep[MAX_CG_FILES + 8];
    unsigned n = 0;
    keep[n++] = cell->lease;
    keep[n++] = cell->channel;
    keep[n++] = cell->wall;
    keep[n++] = cell->cpu;
    keep[n++] = cell->out[0];
    keep[n++] = cell->out[1];
    for (unsigned i = 0; i < c->nlimits; i++)
        keep[n++] = cell->limit_fd[i];
    return close_all_but(keep, n);
}

static int become_harmless(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    if (setsid() < 0)
        return fail(f, "setsid");
    if (cgroup_attach(cell, f) < 0)
        return -1;
    /* We are the first and only process of the cgroup until execve: what it has been charged with by
     * then is our own CPU time since here. Cheaper to ask for than the cgroup's file. */
    cell->shared->cpu_base_ns = c->into && !cell->warm ? 0 : cpu_ns();
    if (cell->shared->cpu_base_ns < 0)
        return fail(f, "cpu clock");
    /* Only now: a write to cgroup.procs from a new cgroup namespace is ENOENT (v2). */
    if (unshare(CLONE_NEWCGROUP) < 0)
        return fail(f, "cgroup namespace");
    if (keep_only(cell) < 0)
        return fail(f, "close descriptors");
    if (c->mode != IDS_SINGLE) {
        if (setresgid(c->job_gid, c->job_gid, c->job_gid) < 0)
            return fail(f, "setresgid");
        if (setresuid(c->job_uid, c->job_uid, c->job_uid) < 0)
            return fail(f, "setresuid");
    }
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || set_capabilities(0) < 0)
        return fail(f, "drop capabilities");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return fail(f, "no_new_privs");
    for (unsigned i = 0; i < c->nrlimits; i++)
        if (set_rlimit(&c->rlimits[i], 0, f) < 0)
            return -1;
    return 0;
}

/* Whether our working directory is the session's own. */
static bool kept(const struct cell *cell)
{
    return cell->session && !cell->private;
}

static void park(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    int listener = -1;
    char byte;
    if (c->filter_early && c->filter.len && (listener = load_filter(c)) < 0) {
        fail(f, "seccomp");
        job_fail(cell, f);
    }
    /* init answers when the mounts stand. */
    ssize_t n = send_byte(cell->channel, c->filter_early && c->filter_notify ? listener : -1);
    if (n == 0)
        n = read(cell->channel, &byte, 1);
    if (n < 0) {
        fail(f, "park");
        job_fail(cell, f);
    }
    if (n == 0)
        _exit(125); /* init is dead, and so are we */
    if (c->filter_early && c->filter_notify)
        close(listener);
    if (c->filter_early || !c->filter_notify)
        close_fd(&cell->channel);
    /* What a job does not say otherwise; ours until then. */
    cleanup_close int null = open("/dev/null", O_RDWR | O_CLOEXEC | O_NOCTTY);
    int given[3] = {null, cell->out[0], cell->out[1]};
    for (int target = 0; target < 3; target++)
        if (null < 0 || dup3(given[target] < 0 ? null : given[target], target, 0) < 0) {
            fail(f, "park");
            job_fail(cell, f);
        }
    close_fd(&cell->out[0]);
    close_fd(&cell->out[1]);
    /* A session's directory is the business of the job that runs now, if there is one. */
    if (!kept(cell) && chdir(c->workdir) < 0) {
        fail_at(f, "chdir", c->workdir);
        job_fail(cell, f);
    }
    memset(buffer, 0, 4096); /* a page fault less when the job comes */
}

static int take_limit(const struct cell *cell, const struct field *fl, struct failure *f)
{
    const struct config *c = cell->config;
    if (fl->index >= c->nlimits) {
        errno = EBADMSG;
        return fail(f, "limit");
    }
    int fd = cell->limit_fd[fl->index];
    errno = ENOENT;
    return fd < 0 || write(fd, fl->data, fl->length) < 0
               ? fail_at(f, "limit", c->limits[fl->index].name)
               : 0;
}

static int count(struct reader r, size_t *args, size_t *envs)
{
    struct field f;
    int more;
    *args = *envs = 0;
    while ((more = wire_next(&r, &f)) > 0) {
        *args += f.tag == TAG_ARG;
        *envs += f.tag == TAG_ENV;
    }
    return more;
}

/* First pass: everything but the files and rlimits, which depend on it. */
static int parse(struct cell *cell, struct job *job, struct reader r, struct failure *f)
{
    struct field fl;
    size_t args, envs, a = 0, e = 0;
    uint64_t v;
    errno = EBADMSG;
    if (count(r, &args, &envs) < 0 || args == 0)
        return fail(f, "job message");
    /* A heap would have to be made first. */
    static char *few[256];
    char **strings = few;
    if (args + envs + 2 > ARRAY_LEN(few))
        strings = calloc(args + envs + 2, sizeof(char *));
    if (!strings)
        return fail(f, "memory");
    *job = (struct job){.argv = strings, .envp = strings + args + 1, .path = ""};
    while (wire_next(&r, &fl) > 0) {
        const char *s = NULL;
        switch (fl.tag) {
        case TAG_ARG:
            job->argv[a++] = (char *)(s = wire_string(&fl));
            break;
        case TAG_ENV:
            job->envp[e++] = (char *)(s = wire_string(&fl));
            break;
        case TAG_CWD:
            job->cwd = s = wire_string(&fl);
            break;
        case TAG_PATH:
            job->path = s = wire_string(&fl);
            break;
        case TAG_STDIO:
            job->stdio = fl.index;
            cell->shared->collect = (fl.index & STDIO_COLLECT) != 0;
            s = "";
            break;
        case TAG_WALL:
        case TAG_CPU:
            if (!wire_u64(&fl, &v) || v > INT64_MAX)
                break;
            if (fl.tag == TAG_WALL)
                cell->shared->wall_ns = (int64_t)v;
            else {
                cell->shared->cpu_ns = (int64_t)v;
                cell->shared->ncpus = fl.index ? fl.index : 1;
            }
            s = "";
            break;
        case TAG_LIMIT:
            if (take_limit(cell, &fl, f) < 0)
                return -1;
            s = "";
            break;
        case TAG_PUT:
        case TAG_RLIMIT:
            s = "";
            break;
        default:
            break;
        }
        if (!s) {
            errno = EBADMSG;
            return fail(f, "job message");
        }
    }
    return 0;
}

static int set_stdio(struct job *job, const int *fds, unsigned nfds, unsigned next,
                     struct failure *f)
{
    int from[3] = {0, 0, 0}; /* what is not said otherwise is 0 as it parked: /dev/null */
    for (int target = 0; target < 3; target++)
        if (job->stdio & (1u << target)) {
            errno = EBADMSG;
            if (next >= nfds)
                return fail(f, "stdio");
            from[target] = fds[next++];
        }
    if (job->stdio & STDIO_RESULT && next < nfds && map_answer(job, fds[next]) < 0)
        return fail(f, "answer");
    if (job->stdio & STDIO_OUT_KEPT)
        from[1] = 1;
    if (job->stdio & STDIO_MERGE)
        from[2] = 1;
    if (job->stdio & STDIO_ERR_KEPT)
        from[2] = 2;
    /* 0 last, which the others may be copies of; 2 after 1. */
    static const int order[3] = {1, 2, 0};
    for (int i = 0; i < 3; i++) {
        int target = order[i];
        if (from[target] != target && dup3(from[target], target, 0) < 0)
            return fail(f, "stdio");
    }
    /* A session leader since setsid, without a terminal so far. */
    if (job->stdio & STDIO_TERMINAL && ioctl(0, TIOCSCTTY, 0) < 0)
        return fail(f, "controlling terminal");
    return 0;
}

static int arm(int fd, int64_t ns)
{
    struct itimerspec t = {.it_value = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000}};
    return ns > 0 ? timerfd_settime(fd, 0, &t, NULL) : 0;
}

_Noreturn static void execute(struct cell *cell, const struct job *job)
{
    struct failure f = {0};
    const char *name = job->argv[0];
    int error = ENOENT;
    char path[4096];
    size_t name_len = strlen(name);
    if (strchr(name, '/')) {
        execve(name, job->argv, job->envp);
        error = errno;
    } else if (name_len > 0) {
        for (const char *dir = job->path; *dir;) {
            size_t len = strcspn(dir, ":");
            if (len > 0 && len + name_len + 2 <= sizeof(path)) {
                memcpy(path, dir, len);
                path[len] = '/';
                memcpy(path + len + 1, name, name_len + 1);
                execve(path, job->argv, job->envp);
                if (errno == EACCES)
                    error = EACCES; /* as execvp: reported unless a later directory has it */
                else if (errno != ENOENT && errno != ENOTDIR) {
                    error = errno;
                    break;
                }
            }
            dir += len + (dir[len] == ':');
        }
    }
    errno = error;
    fail(&f, "execve");
    job_fail(cell, &f);
}

/* init may have given the cell up in this very moment: then nothing of the job must run. */
static void advance(struct cell *cell, uint32_t from, uint32_t to)
{
    if (!__atomic_compare_exchange_n(&cell->shared->state, &from, to, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_ACQUIRE))
        _exit(125);
}

void job_started(void)
{
    close_fd(&started);
}

void job_harmless(struct cell *cell)
{
    struct failure f = {0};
    if (become_harmless(cell, &f) < 0)
        job_fail(cell, &f);
    prctl(PR_SET_NAME, "isojob-cell");
}

void job_park(struct cell *cell)
{
    struct failure f = {0};
    park(cell, &f);
    advance(cell, JOB_SETUP, JOB_PARKED);
}

void job_take(struct cell *cell, struct job *job)
{
    struct failure f = {0};
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds, first = 0;
    sigset_t none;
    int n = wire_receive(cell->lease, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0);
    if (n == 0)
        _exit(125); /* the host went away */
    cell->shared->received_ns = now_ns();
    advance(cell, JOB_PARKED, JOB_STARTED);
    errno = n < 0 ? errno : EBADMSG;
    if (n < 0 || h.type != MSG_JOB) {
        fail(&f, "job message");
        job_fail(cell, &f);
    }
    if (h.flags & FLAG_MEMFD) {
        if (wire_map(fds[0], h.length, &r) < 0) {
            fail(&f, "job message");
            job_fail(cell, &f);
        }
        first = 1;
    }
    if (parse(cell, job, r, &f) < 0)
        job_fail(cell, &f);
    job->mapped = first ? r : (struct reader){0};
    if (job->stdio & STDIO_STARTED && nfds > first)
        started = fds[nfds - 1];
    /* It belongs to the job before us, which may have closed it. */
    const char *workdir = cell->config->workdir;
    if (kept(cell) && (fchmodat(AT_FDCWD, workdir, 0755, 0) < 0 || chdir(workdir) < 0)) {
        fail_at(&f, "chdir", workdir);
        job_fail(cell, &f);
    }
    if (job->cwd && chdir(job->cwd) < 0) {
        fail_at(&f, "chdir", job->cwd);
        job_fail(cell, &f);
    }
    if (put_files(r, &f) < 0 || set_stdio(job, fds, nfds, first, &f) < 0 ||
        set_rlimits(r, job->answer_size, &f) < 0)
        job_fail(cell, &f);
    const struct config *c = cell->config;
    struct shared *s = cell->shared;
    int64_t used = cpu_ns();
    if (used < 0) {
        fail(&f, "cpu clock");
        job_fail(cell, &f);
    }
    s->cpu_base_ns = used - s->cpu_base_ns;
    s->start_ns = now_ns();
    if (arm(cell->wall, s->wall_ns) < 0 ||
        (c->cpu >= 0 && s->cpu_ns > 0 && arm(cell->cpu, s->cpu_ns / s->ncpus + 1) < 0)) {
        fail(&f, "timer");
        job_fail(cell, &f);
    }
    /* These are close-on-exec; everything else goes now. */
    const int keep[] = {cell->channel, started};
    if (close_all_but(keep, ARRAY_LEN(keep)) < 0) {
        fail(&f, "close descriptors");
        job_fail(cell, &f);
    }
    sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) < 0) {
        fail(&f, "signal mask");
        job_fail(cell, &f);
    }
    told = started; /* here: a late filter may refuse it */
    (void)!(told >= 0 && write(told, "", 1));
    if (!c->filter_early && c->filter.len && load_late(cell, &f) < 0)
        job_fail(cell, &f);
    __atomic_store_n(&s->state, JOB_EXEC, __ATOMIC_RELEASE);
    if (job->stdio & STDIO_NO_EXEC)
        _exit(0);
}

_Noreturn void job_main(struct cell *cell)
{
    struct job job;
    job_harmless(cell);
    job_park(cell);
    job_take(cell, &job);
    execute(cell, &job);
}
