/* init's search for the files that the host wants, in a directory that a job has left behind. */
#include "../isojob/native/zygote.h"

#include <sys/stat.h>

#include "targets.h"

static struct reader request;
static uint64_t offered, most;
static ino_t secret;

/* The host's request; an empty one, if it is not about the job's directory. */
static int receive(int sock, void *buffer, size_t size, struct header *h, struct reader *r,
                   int *fds, unsigned *nfds, int flags)
{
    struct reader look = request;
    struct field f;
    uint64_t more;
    (void)sock, (void)buffer, (void)size, (void)fds, (void)flags;
    most = 0;
    for (bool first = true; wire_next(&look, &f) > 0; first = false) {
        bool says = f.tag == TAG_COLLECT_MAX && wire_u64(&f, &more);
        if (first && !says)
            most = 1024; /* until another is said, each of which counts for what follows it */
        if (says && (most += more) < more)
            most = UINT64_MAX;
        if (f.tag == TAG_CWD && wire_string(&f) && f.data[0] != '/')
            request.end = request.at;
    }
    *h = (struct header){.type = MSG_COLLECT};
    *r = request;
    *nfds = 0;
    return 1;
}

/* A regular file of the job's, by a name below its directory; or a reason. */
static int sent(int sock, struct writer *w, int fd, int flags)
{
    struct stat st;
    struct reader r = {.at = w->buffer + sizeof(struct header), .end = w->buffer + w->used};
    struct field name, reason;
    (void)sock, (void)flags;
    if (w->full || wire_next(&r, &name) != 1 || name.tag != TAG_NAME || !wire_string(&name))
        abort();
    if (fd < 0 && (wire_next(&r, &reason) != 1 || !wire_string(&reason)))
        abort();
    if (fd >= 0 && (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_ino == secret ||
                    ++offered > most || name.data[0] == '/'))
        abort();
    return r.at == r.end ? 0 : (abort(), -1);
}

#define wire_receive receive
#define wire_send sent
#include "../isojob/native/collect.c"

static void put(int dir, const char *name)
{
    close(openat(dir, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0));
}

/* Names of all kinds, and ways out of it. */
static int directory(void)
{
    char longest[NAME_MAX + 1];
    struct stat st;
    mkdir("collect", 0755);
    put(AT_FDCWD, "secret");
    if (stat("secret", &st) < 0)
        abort();
    secret = st.st_ino;
    int box = open("collect", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    memset(longest, 'x', NAME_MAX);
    longest[NAME_MAX] = 0;
    const char *files[] = {"out.txt", "a*b", "[", "\xff\xfe", "line\nbreak", "...", longest};
    for (size_t i = 0; i < ARRAY_LEN(files); i++)
        put(box, files[i]);
    mkfifoat(box, "fifo", 0644);
    symlinkat("../secret", box, "link");
    symlinkat("..", box, "up");
    symlinkat("loop", box, "loop");
    int at = dup(box);
    for (int depth = 0; depth < 40; depth++) {
        mkdirat(at, "d", 0755);
        int next = openat(at, "d", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        put(at, "file");
        close(at);
        at = next;
    }
    close(at);
    return box;
}

int fuzz_collect(const uint8_t *data, size_t size)
{
    static struct config config = {.workdir = ""}; /* so that any path is below it */
    static struct shared shared = {.collect = 1};
    static struct cell cell = {.config = &config, .shared = &shared, .lease = -1, .workdir = -1};
    if (cell.workdir < 0)
        cell.workdir = directory();
    request = (struct reader){.at = data, .end = data + size};
    offered = 0;
    collect_files(&cell);
    return 0;
}
