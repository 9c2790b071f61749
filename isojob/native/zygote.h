/* What the files of the zygote share. Order of the story: zygote.c (the loop), config.c (what the
 * host asked for), root.c (the tree all cells copy), cell.c (making one), init.c (pid 1 of a cell),
 * inside.c (what init mounts), writable.c (a root that a cell can write to), job.c, rlimit.c and
 * filter.c (the launcher, pid 2),
 * shed.c (what zygote and init give up), session.c (a zygote for the cells of one session),
 * template.c and branch.c (warm interpreters), handover.c, execute.c and warm/ (their cells), cgroup.c,
 * collect.c, path.c. */
#ifndef ISOJOB_ZYGOTE_H
#define ISOJOB_ZYGOTE_H

#include <linux/filter.h>
#include <poll.h>
#include <sys/types.h>

#include "util.h"
#include "wire.h"

#define MAX_HIERARCHIES 8
#define MAX_CG_FILES 24
#define MAX_CG_WRITES 256 /* one for each disk, and on v1 for each rate */
#define MAX_COUNTERS 40
#define MAX_MASKS 32
#define MAX_RLIMITS 16
#define MAX_CELL_MOUNTS 64
#define MAX_TEMPLATE_STRINGS 512
#define MAX_TEMPLATES 16
#define MAX_LOWER 60
#define MAX_IMAGES 32

enum id_mode {
    IDS_ROOT = 0,   /* host root: 0 -> A, 1000 -> B, two host ids of its own for each cell */
    IDS_SINGLE = 1, /* own user namespace with one id: the job runs as the caller's uid */
    IDS_RANGES = 2, /* own user namespace with subordinate ids */
};

struct cg_file {
    unsigned hier;
    const char *name;
    bool raw;
};

/* A number in a file of evidence: in the line that begins with `line`, behind `mark`. */
struct counter {
    unsigned file;
    const char *line, *mark;
};

/* Mounted in each cell, in order: a fresh tmpfs, or a bind of something in the template. */
struct cell_mount {
    const char *path;
    const char *options; /* of the tmpfs */
    const char *source;  /* of the bind; NULL: a tmpfs */
};

/* Something in /proc to be hidden in each cell, if it is there and not only for root. */
struct mask {
    const char *path;
    const char *cover; /* NULL: nothing to hide */
};

struct config {
    enum id_mode mode;
    uint32_t uid_base, slots, job_uid, job_gid;
    const char *hostname, *workdir;
    struct sock_fprog filter;
    struct field rlimits[MAX_RLIMITS]; /* the same for every job */
    unsigned nrlimits;
    bool filter_early, filter_notify;
    unsigned nhier;
    int hier[MAX_HIERARCHIES];
    int base_parent[MAX_HIERARCHIES]; /* to remove the pool's own directory at the end */
    const char *base_name[MAX_HIERARCHIES];
    bool into;
    int oom_hier; /* -1: no OOM eventfd */
    uint32_t oom_kills;
    struct cg_file limits[MAX_CG_FILES], evidence[MAX_CG_FILES], kill;
    unsigned nlimits, nevidence;
    struct counter counters[MAX_COUNTERS];
    unsigned ncounters;
    int cpu;         /* which counter; -1: none */
    int64_t cpu_unit; /* nanoseconds */
    bool has_kill;
    struct mask masks[MAX_MASKS];
    unsigned nmasks;
    struct cell_mount mounts[MAX_CELL_MOUNTS];
    unsigned nmounts;
    int images[MAX_IMAGES]; /* mounts attached nowhere, until the root is built */
    unsigned nimages;
    uint32_t nlower; /* layers of a root that each cell can write to; 0: none can */
    int host; /* pidfd of the host process */
    int ids_lock; /* -1: there is none */
    /* What the template is executed with; empty: there is none. */
    char *template_argv[MAX_TEMPLATE_STRINGS], *template_envp[MAX_TEMPLATE_STRINGS];
    unsigned template_args, template_envs;
    struct sock_fprog template_filter;
    uint32_t template_mask;
    struct field template_writes[MAX_CG_FILES];
    unsigned ntemplate_writes;
};

/* A step that failed: what, and why. Static or config-owned string. */
struct failure {
    char stage[96];
    int error;
};
void record_failure(struct failure *f, const char *stage, const char *subject);
/* Records stage and errno; returns -1 so that callers can `return fail(...)`. Here, and not in
 * config.c, so that an analyser sees it too. */
static inline int fail_at(struct failure *f, const char *stage, const char *subject)
{
    record_failure(f, stage, subject);
    return -1;
}
static inline int fail(struct failure *f, const char *stage)
{
    return fail_at(f, stage, NULL);
}

/* How far the launcher got; in the page it shares with init until execve unmaps it. */
enum job_state {
    JOB_SETUP = 0,   /* still becoming harmless */
    JOB_PARKED = 1,  /* waits for its job */
    JOB_STARTED = 2, /* has read it */
    JOB_EXEC = 3,    /* everything done, execve entered */
    JOB_FAILED = 4,  /* see failure */
};

struct shared {
    uint32_t state;
    struct failure failure;
    int64_t received_ns, start_ns, cpu_base_ns;
    int64_t wall_ns, cpu_ns; /* 0: unlimited */
    uint32_t ncpus;
    int32_t notify_fd; /* filter.c, late listener */
    uint32_t collect;  /* a COLLECT message follows the job's */
};

/* What one cell is made of, as init and the launcher see it. */
struct cell {
    const struct config *config;
    int lease;     /* our end of the host's socket */
    int out[2];    /* stdout and stderr, if the host gave them ahead of time */
    int alive;     /* read end of the zygote's pipe: HUP when it is gone */
    int go;        /* zygote -> init: the maps are written */
    int channel;   /* init <-> launcher, until the launcher parks */
    int signals;   /* signalfd of init */
    int wall, cpu; /* timerfds, armed by the launcher */
    int oom, oom_above; /* eventfds (v1): of our cgroup, of the pool's */
    int listener;  /* seccomp notifications */
    int dir[MAX_HIERARCHIES]; /* this cell's cgroup directories, O_PATH; -1: none */
    int limit_fd[MAX_CG_FILES], evidence_fd[MAX_CG_FILES];
    int kill_fd, attach_fd[MAX_HIERARCHIES];
    int workdir; /* the directory itself: of a writable root the job may rename what is above */
    int lower[MAX_LOWER]; /* layers as mounts that are owned by the job; -1: as they are */
    uint64_t disk, inodes;
    uint32_t id;
    bool session, private; /* the working directory is the session's; or its copy */
    struct field writes[MAX_CG_WRITES];
    unsigned nwrites;
    struct field lift; /* of the CPU quota; length 0: there is none */
    int lift_fd;
    struct shared *shared;
    int shared_fd; /* of a warm cell: the page as a memfd */
    int config_fd; /* of a warm cell: what its init reads the configuration from */
    bool warm;     /* the launcher is forked from a template */
    uint32_t template; /* from which */
    pid_t job;
};

/* config.c */
int config_parse(struct config *c, struct reader *r, const int *fds, unsigned nfds,
                 struct failure *f);
/* path.c */
/* Whether the directory has such a name; -1: it does not say. */
int is_there(int dir, const char *leaf);
/* Whether the one can be mounted on the other: a directory on a directory, and nothing on a link. */
int check_kinds(mode_t source, mode_t target);
/* A directory fd of the parent of `path` below `root`, parents made as needed; *leaf is the last
 * component. A link, `.` or `..` on the way is refused. */
int open_parent(int root, const char *path, char *leaf, size_t size);
int put_file(int root, const char *path, const void *data, size_t len, mode_t mode);
/* All TAG_PUT of a message, into the working directory. */
int put_files(struct reader r, struct failure *f);
/* copy.c */
/* Copies a file or directory of the host into the root; EFBIG: too large, and nothing of it is left. */
int copy_tree(int host, const char *source, int root, const char *path);
/* root.c */
/* plan: fields ROOT_*, in order. */
int root_build(struct config *c, struct reader plan, struct failure *f);
/* cell.c */
struct slot {
    pid_t pid; /* 0: free; -1: its cgroups are to go; -2: asked of a template; -3: lost */
    int lease; /* the cell's end, kept until its cgroups are gone: end of file means all is gone */
    uint32_t id;
    uint32_t mask;
    int tries;
    bool session;
    bool lost; /* a session that was killed: its jobs may go on, so nobody else gets its ids */
    uint32_t template; /* that makes it */
};
/* A warm interpreter. */
struct template
{
    int sock; /* to it; -1: there is none */
    int host; /* to whoever asked for it, and ends it by closing; -1: the control socket */
    pid_t pid; /* 0: it has not said anything yet, or is dead */
    bool begun, spoken, ready;
};
/* All of them, and the cell that one was asked for: one at a time. */
struct warm {
    int program, config; /* our own executable; the configuration's memfd */
    pid_t reaper; /* pid 1 of their pid namespace */
    struct slot *slot; /* of the first, whose ids and cgroup all have */
    struct template templates[MAX_TEMPLATES];
    struct slot *pending;
    int hello; /* our end of the new cell's socket */
    int64_t deadline;
    struct writer message;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
};
struct zygote {
    struct config config;
    struct warm warm;
    int control, signals, proc, alive_read, alive_write;
    struct slot *slots;
    uint32_t next_slot, live, removing;
    bool stubborn; /* a cgroup that will not go */
    bool more; /* dead children, perhaps */
    bool session; /* made by session.c */
    uint32_t ids; /* then all its cells have those of this slot */
    int parent; /* and this is the pool's zygote's pipe */
};
/* fds: the lease, and the job's stdout and stderr or nothing; all are the callee's. */
void cell_make(struct zygote *z, const int *fds, unsigned nfds, struct reader *r);
/* Removes the cgroups of a cell; false when the kernel still says EBUSY. */
bool cell_remove(struct zygote *z, struct slot *s);
void report_error(int sock, const struct failure *f);
/* A slot that nobody has; NULL: there is none. */
struct slot *free_slot(struct zygote *z);
int cell_cgroups(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f);
int write_maps(struct zygote *z, const struct slot *s, struct failure *f);
int write_proc(int proc, pid_t pid, const char *file, const char *text);
/* The first of the two ids that its cell has, as our own user namespace numbers them. */
uint32_t slot_ids(const struct zygote *z, const struct slot *s);
/* writable.c */
int writable_layers(struct zygote *z, const struct slot *s, struct cell *cell, struct failure *f);
void writable_close(struct cell *cell);
int writable_try(struct zygote *z, struct failure *f);
int writable_enter(struct cell *cell, struct failure *f);
/* template.c */
int template_start(struct zygote *z, struct failure *f);
/* A socket to a template; ours tells who has sent. */
int template_pair(int *ours, int *theirs, struct failure *f);
/* branch.c */
/* The descriptors of the cell are the callee's. */
int template_ask(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f);
/* Another template, on behalf of whoever holds the other end of `host`, which is the callee's. */
void template_branch(struct zygote *z, int host, struct reader *r);
/* What to wait for; and what to do when it has happened. */
enum { TEMPLATE_POLLS = 1 + 2 * MAX_TEMPLATES };
void template_poll(const struct warm *w, struct pollfd *p);
void template_serve(struct zygote *z, const struct pollfd *p);
void template_reaped(struct zygote *z, pid_t pid);
void template_end(const struct warm *w);
/* handover.c */
/* Nothing open, nothing set. */
void cell_clear(struct cell *cell, const struct config *c);
/* Sends what the other end needs of a cell; `whole`: init, else the launcher. */
int cell_send(int sock, const struct cell *cell, bool whole);
int cell_pack(const struct cell *cell, bool whole, struct writer *w, int *fds, unsigned *nfds);
int cell_receive(int sock, struct cell *cell, struct failure *f);
struct job;
int map_answer(struct job *job, int fd);
/* execute.c: isojob-zygote init SOCKET CHANNEL */
_Noreturn void init_execute(int sock, int channel);
/* zygote.c */
int zygote_slots(struct zygote *z);
/* signalfd and the pipe that tells cells whether we live. */
int zygote_watch(struct zygote *z);
void zygote_run(struct zygote *z);
/* session.c */
/* Forks a zygote whose cells share a working directory; the descriptor is the callee's. */
void session_make(struct zygote *z, int control, struct reader *r);
/* init.c */
_Noreturn void init_main(struct cell *cell);
int init_equip(struct cell *cell, int channel[2], struct failure *f);
int init_settle(struct cell *cell, struct failure *f);
_Noreturn void init_serve(struct cell *cell);
/* inside.c */
/* Looks which masks there is something for. */
int masks_refresh(struct config *c, struct failure *f);
int inside_build(struct cell *cell, struct failure *f);
/* What the caller has mounted below what each cell mounts afresh. */
int inside_mounts(const struct config *c, struct failure *f);
/* A directory of the job's. */
int make_dir(const struct config *c, const char *name, mode_t mode);
/* shed.c */
int close_all_but(const int *keep, unsigned n);
int join_keyring(void);
int drop_bounding_set(void);
int set_capabilities(uint64_t caps);
void init_shed_prepare(void);
int init_shed(void);
int zygote_shed(enum id_mode mode);
/* filter.c */
int load_filter(const struct config *c); /* its listener, or 0; -1 */
int load_late(struct cell *cell, struct failure *f);
int send_byte(int sock, int fd);
int receive_byte(int sock, int *fd); /* with a descriptor if there is one */
/* rlimit.c */
/* `more`: address space that is not the job's. */
int set_rlimit(const struct field *fl, uint64_t more, struct failure *f);
/* All TAG_RLIMIT of a message. */
int set_rlimits(struct reader r, uint64_t more, struct failure *f);
/* job.c: the launcher's steps, in order. Each ends the process if it fails. */
struct job {
    char **argv, **envp;
    const char *path, *cwd;
    unsigned stdio;
    struct reader mapped; /* the message, if it was too long for the socket */
    uint8_t *answer; /* where a warm one puts its words; NULL: nobody wants to know */
    uint64_t answer_size;
};
void job_harmless(struct cell *cell);
void job_park(struct cell *cell);
void job_take(struct cell *cell, struct job *job);
_Noreturn void job_fail(struct cell *cell, const struct failure *f);
void job_started(void); /* what execve says without a word */
_Noreturn void job_main(struct cell *cell);
/* cgroup.c */
int cgroup_open(struct cell *cell, struct failure *f);
void cgroup_close(struct cell *cell);
int cgroup_attach(const struct cell *cell, struct failure *f);
/* Before a kill: a process that has used up its quota would die in the next period only. */
void cgroup_lift(const struct cell *cell);
int64_t cgroup_counter(const struct cell *cell, unsigned which); /* -1: unknown */
int64_t cgroup_cpu_ns(const struct cell *cell); /* the same */
int64_t cgroup_events(int events); /* since they were last asked for */
/* Reads all counters, CPU time among them, into the message. */
void cgroup_report(const struct cell *cell, struct report *r, struct writer *w);
int write_all(int fd, const void *data, size_t len);
/* collect.c */
void collect_files(const struct cell *cell);

#endif
