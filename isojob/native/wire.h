/* The wire: what host, zygote, init and launcher say to each other. isojob/wire.py is its twin.
 *
 * A message is a header and fields: tag, index, length, bytes. All integers little-endian, all sizes
 * bounded, no pointers. Strings carry their NUL. Whoever reads checks; nobody trusts a length. */
#ifndef ISOJOB_WIRE_H
#define ISOJOB_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_MAGIC 0x4a4f5349u /* "ISOJ" */
#define WIRE_VERSION 1
#define WIRE_INLINE_MAX 65536 /* larger bodies travel in a sealed memfd */
#define WIRE_MAX_FDS 80 /* all that a cell is made of: handover.c */

enum message_type {
    MSG_CONFIG = 1,  /* host -> zygote, once; body in a memfd, the plan of the root in the next */
    MSG_MAKE =
        2,    /* host -> zygote: one cell on the attached socket; stdout and stderr may follow */
    MSG_JOB = 3,     /* host -> launcher (J) */
    MSG_COLLECT = 4, /* host -> init, read when the job is over */
    MSG_RESULT = 5,  /* init -> host, last message of a cell */
    MSG_FILE = 6,    /* init -> host, with a descriptor */
    MSG_ERROR = 7,   /* zygote or init -> host: a stage failed */
    MSG_READY = 8,   /* zygote -> host: the root stands */
    MSG_MAP = 9,     /* zygote -> host: run newuidmap and newgidmap on me; and the answer */
    MSG_SESSION = 10, /* host -> zygote: a zygote of its own, on the attached socket */
    MSG_PRELOAD = 11, /* template -> zygote -> host: how far its preloads are */
    MSG_FORK = 12,    /* zygote -> template: a cell, on the attached socket */
    MSG_HELLO = 13,   /* init, executed -> zygote: here I am */
    MSG_CELL = 14,    /* zygote -> init, init -> launcher: what you are made of */
    MSG_BRANCH = 15, /* host -> zygote -> template: another template, a fork that imports more */
};

enum { FLAG_MEMFD = 1 }; /* the body is in the first attached descriptor */

enum tag {
    /* CONFIG */
    TAG_MODE = 1,
    TAG_UID_BASE = 2,
    TAG_SLOTS = 3,
    TAG_JOB_UID = 4,
    TAG_JOB_GID = 5,
    TAG_HOSTNAME = 6,
    TAG_FILTER = 7,       /* struct sock_filter[]; index: FILTER_* */
    TAG_HIERARCHIES = 8,  /* how many cgroup directories follow as descriptors */
    TAG_CG_LIMIT = 9,     /* index: hierarchy; file the launcher writes at job time */
    TAG_CG_EVIDENCE = 10, /* index: hierarchy, CG_RAW; file init reads at the end */
    TAG_CG_CPU = 11,      /* index: which counter is the CPU time; nanoseconds of its unit */
    TAG_CG_KILL = 12,     /* file to write "1" to (v2) */
    TAG_CG_OOM = 13,      /* index: memory hierarchy: OOM eventfds (v1); the counter of kills */
    TAG_CG_INTO = 14,     /* J is born in hierarchy 0 (CLONE_INTO_CGROUP); else writes `tasks` */
    TAG_CG_BASE = 15,     /* index: hierarchy; name; its parent follows as a descriptor */
    TAG_ROOT_DIR = 16,    /* index: mode */
    TAG_ROOT_LINK = 17,   /* path NUL target NUL */
    TAG_ROOT_FILE = 18,   /* index: mode; path NUL content */
    TAG_ROOT_BIND = 19,   /* index: BIND_*; path NUL source NUL */
    TAG_ROOT_NODE = 20,   /* device node: name below /dev */
    TAG_MASK = 21,        /* path below /proc hidden in each cell */
    TAG_CELL_TMPFS = 22,  /* path NUL options NUL: mounted fresh in each cell */
    TAG_HOST_PIDFD = 23,
    TAG_WORKDIR = 24,
    TAG_CELL_BIND = 25, /* path NUL template path NUL: bound again in each cell, below its tmpfs */
    TAG_ROOT_COPY = 27, /* as ROOT_BIND; a copy if it is small, else a bind */
    TAG_ROOT_LAYER = 28, /* source: for the overlay that follows, the highest first; index: or
                            which of the IMAGES, from 1 */
    TAG_ROOT_OVERLAY = 29, /* path: the layers, read-only */
    TAG_ROOT_LOWER = 30, /* path: the layers, side by side, for a root that cells mount */
    TAG_IDS_LOCK = 58, /* a descriptor to be held: the uids are taken as long as it is open */
    TAG_IMAGES = 47, /* how many layers are image files: their mounts follow as descriptors */
    TAG_LOWER = 31, /* how many there are */
    TAG_TEMPLATE_ARG = 40, /* a warm interpreter, which cells' launchers are forked from */
    TAG_TEMPLATE_ENV = 41,
    TAG_TEMPLATE_FILTER = 42, /* as FILTER */
    TAG_TEMPLATE_MASK = 43, /* as CG_MASK */
    TAG_TEMPLATE_WRITE = 44, /* as CG_WRITE */
    TAG_TEMPLATE = 45, /* of MAKE, BRANCH: its number; 0 is the one that was executed */
    TAG_TEMPLATE_FROM = 46, /* of BRANCH: whose fork it is */
    TAG_CG_COUNTER = 26, /* index: which TAG_CG_EVIDENCE; line NUL mark NUL (cgroup.c) */
    /* MAKE */
    TAG_CG_MASK = 32, /* bit n: make the cgroup in hierarchy n */
    TAG_CG_WRITE = 33, /* index: hierarchy; file NUL content */
    TAG_DISK = 34,
    TAG_INODES = 35,
    TAG_CG_LIFT = 36, /* index: hierarchy; file NUL content, written when the job is killed */
    TAG_CELL = 37, /* the host's number for it, which its cgroups are named after */
    TAG_CELL_FDS = 39, /* of CELL: bit n: descriptor n of handover.c is attached */
    TAG_PRIVATE = 38, /* of a session: changes to the working directory are this cell's alone */
    /* JOB */
    TAG_ARG = 48,
    TAG_ENV = 49,
    TAG_CWD = 50,
    TAG_STDIO = 51, /* index: STDIO_* */
    TAG_RLIMIT = 52, /* index: resource; soft, hard; also in CONFIG, for every job */
    TAG_WALL = 53,
    TAG_CPU = 54, /* index: CPUs the job may use at once */
    TAG_LIMIT = 55, /* index: which TAG_CG_LIMIT; content */
    TAG_PUT = 56, /* index: mode; path NUL content */
    TAG_PATH = 57, /* where argv[0] without a slash is looked up */
    /* COLLECT */
    TAG_PATTERN = 64,
    TAG_COLLECT_MAX = 65, /* files at most */
    /* RESULT, FILE, ERROR */
    TAG_REPORT = 80, /* struct report */
    TAG_COUNTERS = 81, /* int64 for each TAG_CG_COUNTER; -1: unknown */
    TAG_EVIDENCE = 82, /* index: which TAG_CG_EVIDENCE with CG_RAW; the file; no bytes: too long */
    TAG_STAGE = 83,
    TAG_ERRNO = 84,
    TAG_NAME = 85, /* index: the position of the TAG_PATTERN that it answers */
    TAG_REASON = 86,
    /* READY */
    TAG_PID = 87,
    /* PRELOAD */
    TAG_TEXT = 88,
};

enum { FILTER_EARLY = 1, FILTER_NOTIFY = 2 };
enum { CG_RAW = 0x100 };
enum {
    BIND_WRITABLE = 1,
    BIND_OPTIONAL = 2,
    BIND_OWN = 4, /* the source is in the root that is being built */
};
enum {
    STDIO_IN = 1, /* its descriptor comes with the message */
    STDIO_OUT = 2,
    STDIO_ERR = 4,
    STDIO_MERGE = 8, /* stderr is stdout's */
    STDIO_COLLECT = 16,
    STDIO_OUT_KEPT = 32, /* the one that came with MAKE */
    STDIO_ERR_KEPT = 64,
    STDIO_STARTED = 128, /* the last descriptor: closed by execve, a byte if that fails */
    STDIO_TERMINAL = 256, /* stdin is a terminal, to be the controlling one */
    STDIO_NO_EXEC = 512, /* the files are all there is to do */
    STDIO_RESULT = 1024, /* a memfd for a warm interpreter's words, behind the streams */
};

/* What init has to say of a job, in one piece: it is read on the caller's time. */
struct report {
    uint32_t state, cause;
    int32_t code, status; /* of the main process: si_code and si_status of waitid(2) */
    uint32_t arch; /* of a forbidden call, and its number */
    int32_t nr;
    int64_t received_ns, start_ns, end_ns, done_ns; /* CLOCK_MONOTONIC */
    int64_t cpu_base_ns, cpu_end_ns; /* of the cgroup; -1: unknown */
    int64_t user_us, system_us, max_rss_kib, voluntary, involuntary; /* of what was reaped */
    int64_t ooms; /* v1: at the own memory limit; -1: unknown */
};

struct header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t length;
    uint32_t flags;
};

struct field {
    uint16_t tag;
    uint16_t index;
    uint32_t length;
    const uint8_t *data;
};

struct reader {
    const uint8_t *at;
    const uint8_t *end;
};

struct writer {
    uint8_t *buffer;
    size_t size;
    size_t used;
    bool full;
};

/* 1: a field; 0: the end; -1: malformed. */
int wire_next(struct reader *r, struct field *f);
/* The field as a string (NUL-terminated, no NUL inside), or NULL. */
const char *wire_string(const struct field *f);
/* The field as two strings, or as a string and the bytes behind it. */
bool wire_pair(const struct field *f, const char **first, const char **second);
bool wire_path_bytes(const struct field *f, const char **path, const uint8_t **data, size_t *len);
bool wire_u64(const struct field *f, uint64_t *value);

void wire_begin(struct writer *w, void *buffer, size_t size, uint16_t type);
void wire_put(struct writer *w, uint16_t tag, uint16_t index, const void *data, size_t len);
void wire_put_string(struct writer *w, uint16_t tag, uint16_t index, const char *s);
void wire_put_u64(struct writer *w, uint16_t tag, uint64_t value);

/* One datagram out, with descriptors. */
int wire_send_fds(int sock, struct writer *w, const int *fds, unsigned nfds, int flags);
/* The same with one, or none if fd < 0. */
int wire_send(int sock, struct writer *w, int fd, int flags);
/* One datagram in: the checked header, then the body as a reader over buffer. Returns the number of
 * body bytes, 0 at end of file (errno 0), -1 with errno. Descriptors are close-on-exec; at most
 * WIRE_MAX_FDS, a truncated message is EBADMSG and its descriptors are closed. */
int wire_receive(int sock, void *buffer, size_t size, struct header *h, struct reader *r, int *fds,
                 unsigned *nfds, int flags);
/* Maps a memfd of so many bytes (0: all there are) and moves the reader there. */
int wire_map(int fd, size_t length, struct reader *r);

#endif
