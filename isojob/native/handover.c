/* A warm cell, whose launcher is forked from a template, does not inherit what it is made of: its
 * descriptors are sent, from the zygote to its init and from there to the launcher.
 *
 *   zygote --CELL--> init (executed afresh: none of the template's memory) --CELL--> launcher */
#include <sys/mman.h>
#include <sys/stat.h>

#include "zygote.h"

enum { FIXED = 11, ALL = FIXED + 2 * MAX_CG_FILES + MAX_HIERARCHIES };
_Static_assert(ALL <= WIRE_MAX_FDS, "more descriptors than a message takes");

void cell_clear(struct cell *cell, const struct config *c)
{
    *cell = (struct cell){.config = c,
                          .alive = -1,
                          .lease = -1,
                          .out = {-1, -1},
                          .channel = -1,
                          .signals = -1,
                          .wall = -1,
                          .cpu = -1,
                          .oom = -1,
                          .oom_above = -1,
                          .listener = -1,
                          .kill_fd = -1,
                          .lift_fd = -1,
                          .shared_fd = -1,
                          .config_fd = -1,
                          .workdir = -1,
                          .go = -1};
    memset(cell->dir, -1, sizeof(cell->dir));
    memset(cell->limit_fd, -1, sizeof(cell->limit_fd));
    memset(cell->evidence_fd, -1, sizeof(cell->evidence_fd));
    memset(cell->attach_fd, -1, sizeof(cell->attach_fd));
    memset(cell->lower, -1, sizeof(cell->lower));
}

static const uint16_t tags[] = {TAG_DISK, TAG_INODES};

/* Where each descriptor belongs, in the order of the bits of TAG_CELL_FDS. */
static void list_fds(struct cell *cell, int *at[ALL])
{
    int *fixed[FIXED] = {&cell->lease,     &cell->out[0],  &cell->out[1], &cell->alive,
                         &cell->config_fd, &cell->wall,    &cell->cpu,    &cell->oom,
                         &cell->oom_above, &cell->kill_fd, &cell->lift_fd};
    unsigned n = 0;
    for (unsigned i = 0; i < FIXED; i++)
        at[n++] = fixed[i];
    for (unsigned i = 0; i < MAX_CG_FILES; i++) {
        at[n++] = &cell->limit_fd[i];
        at[n++] = &cell->evidence_fd[i];
    }
    for (unsigned i = 0; i < MAX_HIERARCHIES; i++)
        at[n++] = &cell->attach_fd[i];
}

/* What the launcher has no business with. */
static void keep_from_launcher(struct cell *cell)
{
    cell->alive = cell->config_fd = cell->oom = cell->oom_above = cell->kill_fd = cell->lift_fd =
        -1;
    memset(cell->evidence_fd, -1, sizeof(cell->evidence_fd));
}

int cell_pack(const struct cell *cell, bool whole, struct writer *w, int *fds, unsigned *nfds)
{
    struct cell copy = *cell;
    int *at[ALL];
    uint64_t low = 0, high = 0;
    const uint64_t numbers[] = {cell->disk, cell->inodes};
    if (!whole) {
        keep_from_launcher(&copy);
        copy.config_fd = copy.shared_fd; /* it has read the configuration, and needs the page */
    }
    list_fds(&copy, at);
    *nfds = 0;
    for (unsigned i = 0; i < ALL; i++)
        if (*at[i] >= 0) {
            *(i < 64 ? &low : &high) |= 1ULL << i % 64;
            fds[(*nfds)++] = *at[i];
        }
    const uint64_t bits[2] = {low, high};
    wire_put(w, TAG_CELL_FDS, 0, bits, sizeof(bits));
    for (unsigned i = 0; i < ARRAY_LEN(tags); i++)
        wire_put_u64(w, tags[i], numbers[i]);
    if (cell->lift.length)
        wire_put(w, TAG_CG_LIFT, cell->lift.index, cell->lift.data, cell->lift.length);
    return w->full ? -1 : 0;
}

int cell_send(int sock, const struct cell *cell, bool whole)
{
    char buffer[512];
    struct writer w;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    wire_begin(&w, buffer, sizeof(buffer), MSG_CELL);
    return cell_pack(cell, whole, &w, fds, &nfds) < 0 ? -1 : wire_send_fds(sock, &w, fds, nfds, 0);
}

static int take(struct cell *cell, struct reader *r, const int *fds, unsigned nfds)
{
    struct field fl;
    int more, *at[ALL];
    uint64_t bits[2] = {0}, *numbers[] = {&cell->disk, &cell->inodes};
    unsigned next = 0;
    list_fds(cell, at);
    while ((more = wire_next(r, &fl)) > 0) {
        if (fl.tag == TAG_CELL_FDS && fl.length == sizeof(bits))
            memcpy(bits, fl.data, sizeof(bits));
        else if (fl.tag == TAG_CG_LIFT)
            cell->lift = fl;
        else if (fl.tag == TAG_DISK || fl.tag == TAG_INODES) {
            if (!wire_u64(&fl, numbers[fl.tag == TAG_INODES]))
                return -1;
        } else
            return -1;
    }
    for (unsigned i = 0; i < ALL; i++)
        if (bits[i / 64] >> i % 64 & 1) {
            if (next >= nfds)
                return -1;
            *at[i] = fds[next++];
        }
    return more < 0 || next != nfds ? -1 : 0;
}

int cell_receive(int sock, struct cell *cell, struct failure *f)
{
    static char buffer[1024]; /* what is left of it is pointed to */
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    int n = wire_receive(sock, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0);
    if (n == 0)
        _exit(125); /* the zygote, or init, is gone */
    if (n < 0)
        return fail(f, "receive cell");
    if (h.type != MSG_CELL || take(cell, &r, fds, nfds) < 0) {
        errno = EBADMSG;
        return fail(f, "cell");
    }
    return 0;
}

int map_answer(struct job *job, int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -1;
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return -1;
    job->answer = p;
    job->answer_size = (uint64_t)st.st_size;
    return 0;
}
