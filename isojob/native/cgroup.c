/* Files of a cell's cgroups. Which files, for v1 or v2, is the host's knowledge (isojob/cgroups/):
 * here they are names to write, to read and to keep open.
 *
 * All are opened by init before it changes its uid and before it unshares its cgroup namespace: a
 * migration and a limit are judged by the credentials and the namespace of the opener. */
#include <stdio.h>
#include <sys/eventfd.h>

#include "zygote.h"

int write_all(int fd, const void *data, size_t len)
{
    const char *p = data;
    while (len) {
        ssize_t n = write(fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

static int open_in(const struct cell *cell, const struct cg_file *file, int flags)
{
    int dir = cell->dir[file->hier];
    if (dir < 0) {
        errno = ENOENT;
        return -1;
    }
    return openat(dir, file->name, flags | O_CLOEXEC | O_NOFOLLOW);
}

/* The descriptor of a file that is kept open in any case; -1: none. */
static int kept(const struct cg_file *files, const int *fds, unsigned n, const struct cg_file *file)
{
    for (unsigned i = 0; i < n; i++)
        if (files[i].hier == file->hier && strcmp(files[i].name, file->name) == 0)
            return fds[i];
    return -1;
}

/* A field of a cgroup file and what to write into it. */
static bool take_write(const struct field *w, struct cg_file *file, const uint8_t **data,
                       size_t *len)
{
    *file = (struct cg_file){.hier = w->index & 0xff};
    return file->hier < MAX_HIERARCHIES && wire_path_bytes(w, &file->name, data, len) &&
           !strchr(file->name, '/');
}

static int write_setup(const struct cell *cell, const struct field *w, struct failure *f)
{
    const struct config *c = cell->config;
    struct cg_file file;
    const uint8_t *data;
    size_t len;
    bool optional = w->index & 0x100; /* a file that older kernels or configurations lack */
    if (!take_write(w, &file, &data, &len)) {
        errno = EBADMSG;
        return fail(f, "cgroup settings");
    }
    cleanup_close int own = -1;
    int fd = kept(c->limits, cell->limit_fd, c->nlimits, &file);
    if (fd < 0 && (fd = own = open_in(cell, &file, O_WRONLY)) < 0)
        return optional && (errno == ENOENT || errno == EACCES) ? 0
                                                                : fail_at(f, "cgroup", file.name);
    if (write_all(fd, data, len) < 0 && !optional && errno != ENODEV) /* a disk that has gone */
        return fail_at(f, "cgroup", file.name);
    return 0;
}

static int open_lift(struct cell *cell, struct failure *f)
{
    struct cg_file file;
    const uint8_t *data;
    size_t len;
    if (!take_write(&cell->lift, &file, &data, &len)) {
        errno = EBADMSG;
        return fail(f, "cgroup settings");
    }
    cell->lift_fd = open_in(cell, &file, O_WRONLY);
    return cell->lift_fd < 0 ? fail_at(f, "cgroup", file.name) : 0;
}

void cgroup_lift(const struct cell *cell)
{
    struct cg_file file;
    const uint8_t *data;
    size_t len;
    if (cell->lift_fd >= 0 && take_write(&cell->lift, &file, &data, &len))
        (void)!pwrite(cell->lift_fd, data, len, 0);
}

static int watch_oom(int dir, int *events, struct failure *f)
{
    char line[32];
    cleanup_close int control = openat(dir, "memory.oom_control", O_RDONLY | O_CLOEXEC);
    cleanup_close int event_control = openat(dir, "cgroup.event_control", O_WRONLY | O_CLOEXEC);
    *events = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (control < 0 || event_control < 0 || *events < 0)
        return fail(f, "cgroup memory.oom_control");
    int n = snprintf(line, sizeof(line), "%d %d", *events, control);
    return write_all(event_control, line, (size_t)n) < 0 ? fail(f, "cgroup cgroup.event_control")
                                                         : 0;
}

/* v1 tells of an OOM where the limit is and in all cgroups below, from the top down
 * (memcg1_oom_notify), and of a host's in none. What we are told and the pool's cgroup is not is of
 * our own limit. The pool's is watched first: what comes in between is not taken for ours. */
static int open_oom(struct cell *cell, struct failure *f)
{
    int dir = cell->dir[cell->config->oom_hier];
    cleanup_close int above = openat(dir, "..", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (above < 0)
        return fail(f, "cgroup memory.oom_control");
    return watch_oom(above, &cell->oom_above, f) < 0 ? -1 : watch_oom(dir, &cell->oom, f);
}

int64_t cgroup_events(int events)
{
    uint64_t n;
    return read(events, &n, sizeof(n)) == sizeof(n) ? (int64_t)n : 0;
}

int cgroup_open(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    for (unsigned i = 0; i < c->nlimits; i++)
        if ((cell->limit_fd[i] = open_in(cell, &c->limits[i], O_WRONLY)) < 0 && errno != ENOENT)
            return fail_at(f, "cgroup", c->limits[i].name);
    for (unsigned i = 0; i < cell->nwrites; i++)
        if (write_setup(cell, &cell->writes[i], f) < 0)
            return -1;
    for (unsigned i = 0; i < c->nevidence; i++)
        if ((cell->evidence_fd[i] = open_in(cell, &c->evidence[i], O_RDONLY)) < 0 &&
            errno != ENOENT)
            return fail_at(f, "cgroup", c->evidence[i].name);
    if (cell->lift.length && open_lift(cell, f) < 0)
        return -1;
    if (c->has_kill && (cell->kill_fd = open_in(cell, &c->kill, O_WRONLY)) < 0 && errno != ENOENT)
        return fail_at(f, "cgroup", c->kill.name);
    if (!c->into || cell->warm)
        for (unsigned i = 0; i < c->nhier; i++) {
            const struct cg_file members = {.hier = i, .name = c->into ? "cgroup.procs" : "tasks"};
            if (cell->dir[i] >= 0 && (cell->attach_fd[i] = open_in(cell, &members, O_WRONLY)) < 0)
                return fail_at(f, "cgroup", members.name);
        }
    return c->oom_hier >= 0 ? open_oom(cell, f) : 0;
}

void cgroup_close(struct cell *cell)
{
    for (unsigned i = 0; i < MAX_CG_FILES; i++) {
        close_fd(&cell->limit_fd[i]);
        close_fd(&cell->evidence_fd[i]);
    }
    for (unsigned i = 0; i < MAX_HIERARCHIES; i++)
        close_fd(&cell->attach_fd[i]);
    close_fd(&cell->oom);
    close_fd(&cell->oom_above);
    close_fd(&cell->kill_fd);
    close_fd(&cell->lift_fd);
}

/* v1: a single thread writing "0" to `tasks` costs 15 us; `cgroup.procs` waits for an RCU grace
 * period (8 ms after 20 ms of idling, measured). That is the one way into v2 for what was not born in
 * its cgroup, the launcher of a warm cell: nobody waits for it. */
int cgroup_attach(const struct cell *cell, struct failure *f)
{
    for (unsigned i = 0; i < cell->config->nhier; i++)
        if (cell->attach_fd[i] >= 0 && write_all(cell->attach_fd[i], "0", 1) < 0)
            return fail(f, "cgroup attach");
    return 0;
}

/* Reads a file whole, as a string; false if there is none. A seq file fills its page before it
 * returns, unless the next line does not fit (fs/seq_file.c): what leaves half of it empty is the
 * whole, and the read that would say so is spared. */
static bool read_whole(int fd, char *text, size_t size, size_t *length)
{
    *length = 0;
    while (fd >= 0 && *length < size - 1) {
        ssize_t n = pread(fd, text + *length, size - 1 - *length, (off_t)*length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        *length += (size_t)n;
        if (n < 2048)
            break;
    }
    text[*length] = 0;
    return fd >= 0;
}

static int64_t find_number(const char *text, const struct counter *k)
{
    size_t n = strlen(k->line);
    while (*text) {
        const char *end = strchrnul(text, '\n');
        if (strncmp(text, k->line, n) == 0) {
            const char *at = strstr(text + n, k->mark);
            if (!at || at > end)
                return -1;
            at += strlen(k->mark);
            return *at >= '0' && *at <= '9' ? (int64_t)strtoll(at, NULL, 10) : -1;
        }
        text = *end ? end + 1 : end;
    }
    return -1;
}

int64_t cgroup_counter(const struct cell *cell, unsigned which)
{
    char text[1024];
    size_t length;
    const struct counter *k = &cell->config->counters[which];
    if (k->file >= cell->config->nevidence ||
        !read_whole(cell->evidence_fd[k->file], text, sizeof(text), &length))
        return -1;
    return find_number(text, k);
}

int64_t cgroup_cpu_ns(const struct cell *cell)
{
    const struct config *c = cell->config;
    int64_t n = c->cpu < 0 ? -1 : cgroup_counter(cell, (unsigned)c->cpu);
    return n < 0 ? -1 : n * c->cpu_unit;
}

void cgroup_report(const struct cell *cell, struct report *r, struct writer *w)
{
    static char text[8192]; /* two of them have room in a message */
    const struct config *c = cell->config;
    int64_t numbers[MAX_COUNTERS];
    size_t length;
    memset(numbers, -1, sizeof(numbers));
    wire_put(w, TAG_COUNTERS, 0, numbers, sizeof(numbers[0]) * c->ncounters);
    uint8_t *counters = w->buffer + w->used - sizeof(numbers[0]) * c->ncounters;
    for (unsigned i = 0; i < c->nevidence; i++) {
        if (!read_whole(cell->evidence_fd[i], text, sizeof(text), &length))
            continue;
        for (unsigned k = 0; k < c->ncounters; k++)
            if (c->counters[k].file == i)
                numbers[k] = find_number(text, &c->counters[k]);
        /* What does not fit is sent as nothing: a part of it would be an account that is too low. */
        if (c->evidence[i].raw && length)
            wire_put(w, TAG_EVIDENCE, (uint16_t)i, text, length < sizeof(text) - 1 ? length : 0);
    }
    int64_t told =
        r->ooms + cgroup_events(cell->oom); /* first: what comes in between is not ours */
    int64_t ours = told - cgroup_events(cell->oom_above);
    r->ooms = cell->oom < 0 ? -1 : ours < 0 ? 0 : ours;
    r->cpu_end_ns = c->cpu < 0 || numbers[c->cpu] < 0 ? -1 : numbers[c->cpu] * c->cpu_unit;
    memcpy(counters, numbers, sizeof(numbers[0]) * c->ncounters);
}
