/* The host's one long message: checked once, kept mapped, never parsed again. */
#include "zygote.h"

void record_failure(struct failure *f, const char *stage, const char *subject)
{
    f->error = errno ? errno : EINVAL;
    size_t n = strnlen(stage, sizeof(f->stage) - 1);
    memcpy(f->stage, stage, n);
    if (subject && n + 2 < sizeof(f->stage)) {
        f->stage[n++] = ' ';
        /* The tail of a long path says more than its head. */
        size_t room = sizeof(f->stage) - 1 - n, len = strlen(subject);
        if (len > room)
            subject += len - room;
        len = strlen(subject);
        memcpy(f->stage + n, subject, len);
        n += len;
    }
    f->stage[n] = 0;
}

static bool take_number(const struct field *f, uint32_t *out)
{
    uint64_t v;
    if (!wire_u64(f, &v) || v > UINT32_MAX)
        return false;
    *out = (uint32_t)v;
    return true;
}

/* Without an array: whoever reads the configuration has no use for descriptors. */
static bool take_fd(const int *fds, unsigned nfds, unsigned *next, int *out)
{
    if (!fds) {
        *out = -1;
        return true;
    }
    if (*next >= nfds)
        return false;
    *out = fds[(*next)++];
    return true;
}

/* As many as the field says, once. */
static bool take_fds(const struct field *f, const int *fds, unsigned nfds, unsigned *next,
                     int *list, unsigned *n, unsigned most)
{
    uint32_t wanted;
    if (!take_number(f, &wanted) || wanted > most || *n)
        return false;
    for (; *n < wanted; (*n)++)
        if (!take_fd(fds, nfds, next, &list[*n]))
            return false;
    return true;
}

static bool add_cg_file(struct cg_file *list, unsigned *n, const struct field *f)
{
    const char *name = wire_string(f);
    unsigned hier = f->index & ~(unsigned)CG_RAW;
    if (!name || *n >= MAX_CG_FILES || hier >= MAX_HIERARCHIES || strchr(name, '/'))
        return false;
    list[(*n)++] = (struct cg_file){.hier = hier, .name = name, .raw = f->index & CG_RAW};
    return true;
}

static bool add_counter(struct config *c, const struct field *f)
{
    if (c->ncounters >= MAX_COUNTERS)
        return false;
    struct counter *k = &c->counters[c->ncounters++];
    k->file = f->index;
    return wire_pair(f, &k->line, &k->mark);
}

static bool take_program(struct sock_fprog *program, const struct field *f)
{
    if (f->length == 0 || f->length % sizeof(struct sock_filter) ||
        f->length / sizeof(struct sock_filter) > BPF_MAXINSNS)
        return false;
    program->len = (unsigned short)(f->length / sizeof(struct sock_filter));
    /* The fields of a message are not aligned; the kernel copies from here. */
    program->filter = malloc(f->length);
    if (!program->filter)
        return false;
    memcpy(program->filter, f->data, f->length);
    return true;
}

static bool take_filter(struct config *c, const struct field *f)
{
    if (!take_program(&c->filter, f))
        return false;
    c->filter_early = f->index & FILTER_EARLY;
    c->filter_notify = f->index & FILTER_NOTIFY;
    return true;
}

/* The last one of the array stays NULL, as execve wants it. */
static bool take_string(char **strings, unsigned *n, const struct field *f)
{
    return *n + 1 < MAX_TEMPLATE_STRINGS && (strings[(*n)++] = (char *)wire_string(f)) != NULL;
}

static bool take_template(struct config *c, const struct field *f)
{
    switch (f->tag) {
    case TAG_TEMPLATE_ARG:
        return take_string(c->template_argv, &c->template_args, f);
    case TAG_TEMPLATE_ENV:
        return take_string(c->template_envp, &c->template_envs, f);
    case TAG_TEMPLATE_FILTER:
        return take_program(&c->template_filter, f);
    case TAG_TEMPLATE_MASK:
        return take_number(f, &c->template_mask);
    default:
        if (c->ntemplate_writes >= MAX_CG_FILES)
            return false;
        c->template_writes[c->ntemplate_writes++] = *f;
        return true;
    }
}

static bool take_field(struct config *c, const struct field *f, const int *fds, unsigned nfds,
                       unsigned *next)
{
    uint32_t n;
    unsigned one = 0;
    switch (f->tag) {
    case TAG_MODE:
        if (!take_number(f, &n) || n > IDS_RANGES)
            return false;
        c->mode = (enum id_mode)n;
        return true;
    case TAG_UID_BASE:
        return take_number(f, &c->uid_base);
    case TAG_SLOTS:
        return take_number(f, &c->slots);
    case TAG_JOB_UID:
        return take_number(f, &c->job_uid) && c->job_uid > 0;
    case TAG_JOB_GID:
        return take_number(f, &c->job_gid) && c->job_gid > 0;
    case TAG_HOSTNAME:
        return (c->hostname = wire_string(f)) != NULL;
    case TAG_WORKDIR:
        return (c->workdir = wire_string(f)) != NULL && c->workdir[0] == '/';
    case TAG_FILTER:
        return take_filter(c, f);
    case TAG_RLIMIT:
        if (c->nrlimits >= MAX_RLIMITS)
            return false;
        c->rlimits[c->nrlimits++] = *f;
        return true;
    case TAG_HIERARCHIES:
        return take_fds(f, fds, nfds, next, c->hier, &c->nhier, MAX_HIERARCHIES);
    case TAG_CG_LIMIT:
        return add_cg_file(c->limits, &c->nlimits, f);
    case TAG_CG_EVIDENCE:
        return add_cg_file(c->evidence, &c->nevidence, f);
    case TAG_CG_COUNTER:
        return add_counter(c, f);
    case TAG_CG_CPU:
        c->cpu = f->index;
        c->cpu_unit = take_number(f, &n) ? n : 0;
        return c->cpu_unit > 0;
    case TAG_CG_KILL:
        c->has_kill = true;
        return add_cg_file(&c->kill, &one, f);
    case TAG_CG_OOM:
        c->oom_hier = f->index;
        return f->index < MAX_HIERARCHIES && take_number(f, &c->oom_kills);
    case TAG_CG_INTO:
        c->into = true;
        return true;
    case TAG_CG_BASE:
        return f->index < MAX_HIERARCHIES && (c->base_name[f->index] = wire_string(f)) != NULL &&
               take_fd(fds, nfds, next, &c->base_parent[f->index]);
    case TAG_IDS_LOCK:
        return take_fd(fds, nfds, next, &c->ids_lock);
    case TAG_HOST_PIDFD:
        return take_fd(fds, nfds, next, &c->host);
    case TAG_MASK:
        return c->nmasks < MAX_MASKS && (c->masks[c->nmasks++].path = wire_string(f)) != NULL;
    case TAG_CELL_TMPFS:
    case TAG_CELL_BIND: {
        if (c->nmounts >= MAX_CELL_MOUNTS)
            return false;
        struct cell_mount *m = &c->mounts[c->nmounts++];
        return wire_pair(f, &m->path, f->tag == TAG_CELL_BIND ? &m->source : &m->options);
    }
    case TAG_IMAGES:
        return take_fds(f, fds, nfds, next, c->images, &c->nimages, MAX_IMAGES);
    case TAG_LOWER:
        return take_number(f, &c->nlower) && c->nlower <= MAX_LOWER;
    case TAG_TEMPLATE_ARG:
    case TAG_TEMPLATE_ENV:
    case TAG_TEMPLATE_FILTER:
    case TAG_TEMPLATE_MASK:
    case TAG_TEMPLATE_WRITE:
        return take_template(c, f);
    default:
        return false;
    }
}

int config_parse(struct config *c, struct reader *r, const int *fds, unsigned nfds,
                 struct failure *fl)
{
    struct field f;
    unsigned next = 2; /* the body, the plan */
    int more;
    *c = (struct config){.host = -1, .ids_lock = -1, .oom_hier = -1, .cpu = -1};
    while ((more = wire_next(r, &f)) > 0)
        if (!take_field(c, &f, fds, nfds, &next)) {
            errno = EBADMSG;
            return fail(fl, "configuration");
        }
    if (more < 0 || !c->hostname || !c->workdir || !c->job_uid || !c->job_gid || !c->slots ||
        (fds && c->host < 0) || (c->template_mask >> c->nhier) || (c->into && !c->nhier) ||
        c->cpu >= (int)c->ncounters || (c->oom_hier >= 0 && c->oom_kills >= c->ncounters)) {
        errno = EBADMSG;
        return fail(fl, "configuration");
    }
    return 0;
}
