/* Files the caller wants back. Run by init when every process of the job is dead, so nothing races;
 * still no name is trusted: opened below the directory without following a link, non-blocking, and
 * only regular files leave, as descriptors. CAP_DAC_READ_SEARCH reads what the job made mode 000. */
#include <dirent.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>

#include "zygote.h"

#define RESOLVE (RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV)
#define MAX_DEPTH 32
#define MAX_LOOKED_AT 200000
#define MAX_NAME 4095 /* what open(2) takes; the job can make deeper ones */
#define MAX_PATTERN 2048
#define MAX_FILES 1024
#define MAX_REFUSED 1024 /* beside the first of each pattern; names of */
#define MAX_REFUSED_BYTES (1 << 20)

struct search {
    int lease;
    uint16_t position; /* of the pattern that is looked for */
    const char *pattern;
    uint64_t left, looked_at;
    unsigned refused; /* for this pattern */
    bool told_more; /* that there are others */
    unsigned refusals_left;
    size_t refused_bytes_left;
    /* Relative name so far. What is searched has at most MAX_NAME bytes; a name that is too long, and
     * what is left of a pattern, can still be told. */
    char name[MAX_NAME + 1 + NAME_MAX + 1 + MAX_PATTERN + 1];
};

static const char too_long[] = "a name of more than 4095 bytes";
static const char elsewhere[] = "in another mount";

/* Names are the job's, and the host keeps them: they are told as long as there is room. The first of a
 * pattern always is, so that what was asked for by name has its reason. */
static bool has_room(struct search *s)
{
    size_t size = strlen(s->name);
    if (s->refused++ == 0)
        return true;
    if (s->refusals_left == 0 || size > s->refused_bytes_left) {
        s->refusals_left = 0;
        return false;
    }
    s->refusals_left--;
    s->refused_bytes_left -= size;
    return true;
}

static void send_file(struct search *s, const char *reason, int fd)
{
    char buffer[sizeof(s->name) + 256];
    struct writer w;
    const char *name = s->name;
    char pattern[MAX_PATTERN + 1];
    if (reason && !has_room(s)) {
        if (s->told_more)
            return;
        s->told_more = true;
        snprintf(pattern, sizeof(pattern), "%s", s->pattern);
        name = pattern;
        reason = "more than can be told cannot be collected";
    }
    wire_begin(&w, buffer, sizeof(buffer), MSG_FILE);
    wire_put_string(&w, TAG_NAME, s->position, name);
    if (reason)
        wire_put_string(&w, TAG_REASON, 0, reason);
    if (wire_send(s->lease, &w, fd, 0) < 0)
        _exit(1); /* a result without it would say that there was none */
}

static const char *kind(mode_t mode)
{
    return S_ISDIR(mode)    ? "a directory"
           : S_ISLNK(mode)  ? "a symbolic link"
           : S_ISFIFO(mode) ? "a FIFO"
           : S_ISSOCK(mode) ? "a socket"
                            : "not a regular file";
}

static void offer(struct search *s, int dir, const char *leaf, bool exact)
{
    struct stat st;
    if (fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) < 0) {
        if (exact || errno != ENOENT)
            send_file(s, errno == ENOENT ? "not found" : strerror(errno), -1);
        return;
    }
    if (!exact && S_ISDIR(st.st_mode))
        return;
    if (strlen(s->name) > MAX_NAME) {
        send_file(s, too_long, -1);
        return;
    }
    if (s->left == 0) {
        send_file(s, "too many files", -1);
        return;
    }
    if (!S_ISREG(st.st_mode)) {
        send_file(s, kind(st.st_mode), -1);
        return;
    }
    cleanup_close int fd = sys_openat2(
        dir, leaf, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC, 0, RESOLVE);
    if (fd < 0 && errno == EXDEV) {
        if (exact)
            send_file(s, elsewhere, -1);
        return;
    }
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        send_file(s, fd < 0 ? strerror(errno) : kind(st.st_mode), -1);
        return;
    }
    s->left--;
    send_file(s, NULL, fd);
}

static void search(struct search *s, int dir, const char *pattern, size_t used, int depth,
                   bool exact);

/* One name that fits the first component: the file, or the way on. It was asked for by name (exact) if
 * there was no wildcard so far. What wildcards happen to fit and is none of the job's is no loss. */
static void descend(struct search *s, int dir, const char *leaf, const char *rest, size_t used,
                    int depth, bool exact)
{
    size_t len = strlen(leaf);
    if (len > NAME_MAX) { /* FUSE and vfat have such names, on a bind */
        memcpy(s->name + used, leaf, NAME_MAX);
        s->name[used + NAME_MAX] = 0;
        send_file(s, "a name of more than 255 bytes, of which these are the first", -1);
        return;
    }
    memcpy(s->name + used, leaf, len + 1);
    if (!rest) {
        offer(s, dir, leaf, exact);
        return;
    }
    cleanup_close int next =
        sys_openat2(dir, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0, RESOLVE);
    if (next < 0) {
        int error = errno;
        if (exact || (error != ENOENT && error != ENOTDIR && error != ELOOP && error != EXDEV)) {
            struct stat st;
            bool there = fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) == 0;
            const char *reason = !there                 ? "not found"
                                 : S_ISLNK(st.st_mode)  ? "behind a symbolic link"
                                 : !S_ISDIR(st.st_mode) ? "not in a directory"
                                 : error == EXDEV       ? elsewhere
                                                        : strerror(error);
            snprintf(s->name + used + len, sizeof(s->name) - used - len, "/%s", rest);
            send_file(s, reason, -1);
        }
        return;
    }
    s->name[used + len] = '/';
    if (used + len + 1 > MAX_NAME) {
        snprintf(s->name + used + len + 1, sizeof(s->name) - used - len - 1, "%s", rest);
        send_file(s, too_long, -1);
        return;
    }
    search(s, next, rest, used + len + 1, depth + 1, exact);
}

static void search(struct search *s, int dir, const char *pattern, size_t used, int depth,
                   bool exact)
{
    char component[256];
    size_t len = strcspn(pattern, "/");
    const char *rest = pattern[len] ? pattern + len + 1 : NULL;
    if (len == 0 || len >= sizeof(component) || depth > MAX_DEPTH) {
        snprintf(s->name + used, sizeof(s->name) - used, "%s", pattern);
        send_file(s, depth > MAX_DEPTH ? "too many directories deep" : "not a file name", -1);
        return;
    }
    memcpy(component, pattern, len);
    component[len] = 0;
    if (!strpbrk(component, "*?[")) {
        descend(s, dir, component, rest, used, depth, exact);
        return;
    }
    cleanup_close int again = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = again < 0 ? NULL : fdopendir(again);
    if (!entries) {
        snprintf(s->name + used, sizeof(s->name) - used, "%s", pattern);
        send_file(s, strerror(errno), -1);
        return;
    }
    again = -1; /* closedir owns it */
    struct dirent *e;
    while ((errno = 0, e = readdir(entries)) && s->looked_at++ < MAX_LOOKED_AT)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") &&
            fnmatch(component, e->d_name, FNM_PERIOD | FNM_NOESCAPE) == 0)
            descend(s, dir, e->d_name, rest, used, depth, false);
    const char *reason = e ? "too many directory entries" : errno ? strerror(errno) : NULL;
    closedir(entries);
    if (reason) {
        snprintf(s->name + used, sizeof(s->name) - used, "%s", pattern);
        send_file(s, reason, -1);
    }
}

/* Of a writable root the job may have renamed what is above its working directory, and put a bind of the
 * caller's there: beneath the descriptor it is what it was. */
static int open_cwd(const struct cell *cell, const char *cwd)
{
    const char *workdir = cell->config->workdir;
    const uint64_t plain = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
    size_t n = strlen(workdir);
    if (strncmp(cwd, workdir, n) || (cwd[n] && cwd[n] != '/'))
        return sys_openat2(AT_FDCWD, cwd, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, plain);
    const char *rest = cwd + n + strspn(cwd + n, "/");
    return sys_openat2(cell->workdir, *rest ? rest : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0,
                       plain | RESOLVE_BENEATH);
}

void collect_files(const struct cell *cell)
{
    static char buffer[sizeof(struct header) + WIRE_INLINE_MAX];
    static struct search s;
    struct header h;
    struct reader r;
    struct field f;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    /* A host that never reads must not keep the cell for ever. */
    struct timeval patience = {.tv_sec = 30};
    if (!cell->shared->collect)
        return;
    /* Announced with the job and sent right behind it, but a short job may end in between. */
    setsockopt(cell->lease, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    int n = wire_receive(cell->lease, buffer, sizeof(buffer), &h, &r, fds, &nfds, 0);
    if (n <= 0 || h.type != MSG_COLLECT || nfds > 0)
        _exit(1); /* as above */
    setsockopt(cell->lease, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    s = (struct search){.lease = cell->lease,
                        .left = MAX_FILES,
                        .refusals_left = MAX_REFUSED,
                        .refused_bytes_left = MAX_REFUSED_BYTES};
    uint16_t position = 0;
    const char *why = "no working directory";
    cleanup_close int dir = -1;
    while (wire_next(&r, &f) > 0) {
        const char *text = f.tag == TAG_CWD || f.tag == TAG_PATTERN ? wire_string(&f) : NULL;
        if (f.tag == TAG_PATTERN) {
            s.position = position++;
            s.pattern = text;
            s.refused = 0;
            s.told_more = false;
        }
        if (f.tag == TAG_COLLECT_MAX)
            wire_u64(&f, &s.left);
        else if (f.tag == TAG_CWD && text) {
            close_fd(&dir);
            dir = open_cwd(cell, text);
            if (dir < 0)
                why = errno == ELOOP ? "the working directory is behind a symbolic link"
                                     : "the working directory is gone";
        } else if (f.tag == TAG_PATTERN && text && dir >= 0)
            search(&s, dir, text, 0, 0, true);
        else if (f.tag == TAG_PATTERN && text) {
            snprintf(s.name, sizeof(s.name), "%s", text);
            send_file(&s, why, -1);
        }
    }
}
