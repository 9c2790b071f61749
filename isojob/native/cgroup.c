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

/* A seq file fills its page before it returns, unless the next line does not fit (fs/seq_file.c):
 * what leaves half of it empty is the whole, and the read that would say so is spared. */
ssize_t read_at(int fd, char *buffer, size_t size)
{
    size_t used = 0;
    while (used < size) {
        ssize_t n = pread(fd, buffer + used, size - used, (off_t)used);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        used += (size_t)n;
        if (n < 2048)
            break;
    }
    return (ssize_t)used;
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

static int write_setup(const struct cell *cell, const struct field *w, struct failure *f)
{
    const struct config *c = cell->config;
    const char *name;
    const uint8_t *data;
    size_t len;
    bool optional = w->index & 0x100; /* a file that older kernels or configurations lack */
    if ((w->index & 0xff) >= MAX_HIERARCHIES || !wire_path_bytes(w, &name, &data, &len) ||
        strchr(name, '/')) {
        errno = EBADMSG;
        return fail(f, "cgroup settings");
    }
    struct cg_file file = {.hier = w->index & 0xff, .name = name};
    cleanup_close int own = -1;
    int fd = kept(c->limits, cell->limit_fd, c->nlimits, &file);
    if (fd < 0 && (fd = own = open_in(cell, &file, O_WRONLY)) < 0)
        return optional && (errno == ENOENT || errno == EACCES) ? 0 : fail_at(f, "cgroup", name);
    if (write_all(fd, data, len) < 0 && !optional)
        return fail_at(f, "cgroup", name);
    return 0;
}

static int open_oom(struct cell *cell, struct failure *f)
{
    char line[32];
    const struct config *c = cell->config;
    const struct cg_file control = {(unsigned)c->oom_hier, "memory.oom_control"};
    const struct cg_file event = {(unsigned)c->oom_hier, "cgroup.event_control"};
    int control_fd = kept(c->evidence, cell->evidence_fd, c->nevidence, &control);
    cleanup_close int event_fd = open_in(cell, &event, O_WRONLY);
    cell->oom = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (control_fd < 0 || event_fd < 0 || cell->oom < 0)
        return fail(f, "cgroup memory.oom_control");
    int n = snprintf(line, sizeof(line), "%d %d", cell->oom, control_fd);
    return write_all(event_fd, line, (size_t)n) < 0 ? fail(f, "cgroup cgroup.event_control") : 0;
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
    if (c->has_cpu) {
        cell->cpu_fd = kept(c->evidence, cell->evidence_fd, c->nevidence, &c->cpu);
        if (cell->cpu_fd < 0 && (cell->cpu_fd = open_in(cell, &c->cpu, O_RDONLY)) < 0)
            return fail_at(f, "cgroup", c->cpu.name);
    }
    if (c->has_kill && (cell->kill_fd = open_in(cell, &c->kill, O_WRONLY)) < 0 && errno != ENOENT)
        return fail_at(f, "cgroup", c->kill.name);
    if (!c->into)
        for (unsigned i = 0; i < c->nhier; i++) {
            const struct cg_file tasks = {i, "tasks"};
            if (cell->dir[i] >= 0 && (cell->attach_fd[i] = open_in(cell, &tasks, O_WRONLY)) < 0)
                return fail(f, "cgroup tasks");
        }
    return c->oom_hier >= 0 ? open_oom(cell, f) : 0;
}

/* v1: a single thread writing "0" to `tasks` costs 15 us; `cgroup.procs` waits for an RCU grace
 * period (8 ms after 20 ms of idling, measured). */
int cgroup_attach(const struct cell *cell, struct failure *f)
{
    for (unsigned i = 0; i < cell->config->nhier; i++)
        if (cell->attach_fd[i] >= 0 && write_all(cell->attach_fd[i], "0", 1) < 0)
            return fail(f, "cgroup attach");
    return 0;
}

int64_t cgroup_cpu_ns(const struct cell *cell)
{
    char text[512];
    if (cell->cpu_fd < 0)
        return -1;
    ssize_t n = read_at(cell->cpu_fd, text, sizeof(text) - 1);
    if (n <= 0)
        return -1;
    text[n] = 0;
    if (!cell->config->cpu_is_usec)
        return (int64_t)strtoll(text, NULL, 10);
    const char *at = strstr(text, "usage_usec ");
    return at ? (int64_t)strtoll(at + 11, NULL, 10) * 1000 : -1;
}
