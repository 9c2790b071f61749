/* Making a cell and taking it away: the zygote's side. */
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "zygote.h"

void report_error(int sock, const struct failure *f)
{
    char buffer[256];
    struct writer w;
    int32_t error = f->error;
    wire_begin(&w, buffer, sizeof(buffer), MSG_ERROR);
    wire_put_string(&w, TAG_STAGE, 0, f->stage);
    wire_put(&w, TAG_ERRNO, 0, &error, sizeof(error));
    wire_send(sock, &w, -1, MSG_DONTWAIT);
}

static int parse_make(struct cell *cell, uint32_t *mask, struct reader *r)
{
    struct field f;
    uint64_t v;
    int more;
    while ((more = wire_next(r, &f)) > 0) {
        switch (f.tag) {
        case TAG_CG_MASK:
            if (!wire_u64(&f, &v) || v >> cell->config->nhier)
                return -1;
            *mask = (uint32_t)v;
            break;
        case TAG_CG_WRITE:
            if (cell->nwrites >= MAX_CG_WRITES)
                return -1;
            cell->writes[cell->nwrites++] = f;
            break;
        case TAG_CG_LIFT:
            cell->lift = f;
            break;
        case TAG_CELL:
            if (!wire_u64(&f, &v) || v > UINT32_MAX)
                return -1;
            cell->id = (uint32_t)v;
            break;
        case TAG_TEMPLATE:
            if (!wire_u64(&f, &v) || v >= MAX_TEMPLATES)
                return -1;
            cell->template = (uint32_t)v;
            break;
        case TAG_PRIVATE:
            cell->private = cell->session;
            break;
        case TAG_DISK:
            if (!wire_u64(&f, &cell->disk))
                return -1;
            break;
        case TAG_INODES:
            if (!wire_u64(&f, &cell->inodes))
                return -1;
            break;
        default:
            return -1;
        }
    }
    return more;
}

struct slot *free_slot(struct zygote *z)
{
    /* Round robin: the ids of a slot rest as long as they can before another cell gets them. */
    for (uint32_t i = 0; i < z->config.slots; i++) {
        struct slot *s = &z->slots[(z->next_slot + i) % z->config.slots];
        if (s->pid == 0) {
            z->next_slot = (z->next_slot + i + 1) % z->config.slots;
            return s;
        }
    }
    return NULL;
}

static void cgroup_name(char name[32], uint32_t id)
{
    snprintf(name, 32, "cell-%u", id);
}

int cell_cgroups(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f)
{
    char name[32];
    cgroup_name(name, s->id);
    for (unsigned i = 0; i < z->config.nhier; i++) {
        if (!(s->mask & (1u << i)))
            continue;
        if (mkdirat(z->config.hier[i], name, 0755) < 0)
            return fail(f, "cgroup mkdir");
        cell->dir[i] = openat(z->config.hier[i], name, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (cell->dir[i] < 0)
            return fail(f, "cgroup open");
    }
    return 0;
}

bool cell_remove(struct zygote *z, struct slot *s)
{
    char name[32];
    cgroup_name(name, s->id);
    for (unsigned i = 0; i < z->config.nhier; i++) {
        if (!(s->mask & (1u << i)))
            continue;
        if (unlinkat(z->config.hier[i], name, AT_REMOVEDIR) < 0 && errno == EBUSY)
            return false;
        s->mask &= ~(1u << i);
    }
    return true;
}

int write_proc(int proc, pid_t pid, const char *file, const char *text)
{
    char path[48];
    snprintf(path, sizeof(path), "%d/%s", pid, file);
    cleanup_close int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);
    return fd < 0 ? -1 : write_all(fd, text, strlen(text));
}

uint32_t slot_ids(const struct zygote *z, const struct slot *s)
{
    return z->config.uid_base + 2 * (z->session ? z->ids : (uint32_t)(s - z->slots));
}

/* We are the parent and have not reaped it: the pid cannot be another process. Host uid 0 is never
 * among the targets. One id (rootless without subordinate ranges) maps to the job's uid, not to 0:
 * the owner of pid 1's user namespace would otherwise own its sysctls. */
int write_maps(struct zygote *z, const struct slot *s, struct failure *f)
{
    const struct config *c = &z->config;
    char uids[64], gids[64];
    uint32_t base = slot_ids(z, s);
    if (c->mode == IDS_SINGLE) {
        snprintf(uids, sizeof(uids), "%u 0 1\n", c->job_uid);
        snprintf(gids, sizeof(gids), "%u 0 1\n", c->job_gid);
    } else {
        snprintf(uids, sizeof(uids), "0 %u 1\n%u %u 1\n", base, c->job_uid, base + 1);
        snprintf(gids, sizeof(gids), "0 %u 1\n%u %u 1\n", base, c->job_gid, base + 1);
    }
    if (write_proc(z->proc, s->pid, "setgroups", "deny") < 0)
        return fail(f, "setgroups deny");
    if (write_proc(z->proc, s->pid, "uid_map", uids) < 0)
        return fail(f, "uid_map");
    if (write_proc(z->proc, s->pid, "gid_map", gids) < 0)
        return fail(f, "gid_map");
    return 0;
}

static int start(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f)
{
    int go[2];
    if (cell_cgroups(z, s, cell, f) < 0)
        return -1;
    if (z->config.template_args)
        return template_ask(z, s, cell, f);
    if (writable_layers(z, s, cell, f) < 0)
        return -1;
    if (masks_refresh(&z->config, f) < 0)
        return -1;
    cell->shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (cell->shared == MAP_FAILED)
        return fail(f, "mmap");
    if (pipe2(go, O_CLOEXEC) < 0) {
        munmap(cell->shared, 4096);
        return fail(f, "pipe");
    }
    cleanup_close int go_write = go[1];
    cell->go = go[0];
    struct clone_args args = {
        .flags =
            CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS,
        .exit_signal = SIGCHLD,
    };
    pid_t pid = sys_clone3(&args);
    if (pid == 0)
        init_main(cell);
    munmap(cell->shared, 4096);
    close_fd(&cell->go);
    if (pid < 0)
        return fail(f, "clone");
    s->pid = pid;
    z->live++;
    if (write_maps(z, s, f) < 0 || write_all(go_write, "g", 1) < 0) {
        kill(pid, SIGKILL); /* reaped like any other */
        return f->error ? -1 : fail(f, "start init");
    }
    return 0;
}

void cell_make(struct zygote *z, const int *fds, unsigned nfds, struct reader *r)
{
    struct failure f = {0};
    int lease = fds[0];
    struct cell cell;
    cell_clear(&cell, &z->config);
    cell.alive = z->alive_read;
    cell.lease = lease;
    cell.out[0] = nfds > 1 ? fds[1] : -1;
    cell.out[1] = nfds > 2 ? fds[2] : -1;
    cell.session = z->session;
    struct slot *s = free_slot(z);
    uint32_t mask = 0;
    if (!s || parse_make(&cell, &mask, r) < 0) {
        errno = s ? EBADMSG : EAGAIN;
        fail(&f, s ? "make" : "slots");
        report_error(lease, &f);
        for (unsigned i = 0; i < nfds; i++)
            close(fds[i]);
        return;
    }
    *s = (struct slot){.lease = lease, .id = cell.id, .mask = mask};
    if (start(z, s, &cell, &f) < 0) {
        report_error(lease, &f);
        if (s->pid == 0) {
            cell_remove(z, s);
            close(lease);
        }
    }
    for (unsigned i = 0; i < z->config.nhier; i++)
        if (cell.dir[i] >= 0)
            close(cell.dir[i]);
    for (unsigned i = 1; i < nfds; i++)
        close(fds[i]);
    writable_close(&cell);
}
