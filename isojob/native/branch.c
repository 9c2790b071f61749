/* What a zygote says to its templates, and they to it: cells, other templates, and their ends.
 *
 * The first template is executed (template.c); any other is a fork of one, that imports more. It ends
 * when whoever asked for it closes its socket. */
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "zygote.h"

#define PATIENCE_NS (10 * (int64_t)1000000000)

static char message_buffer[1024];

static void drop(int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        close_fd(&fds[i]);
}

/* The cell that was asked for will not be. */
static void give_up(struct zygote *z, const struct failure *f)
{
    struct warm *w = &z->warm;
    struct slot *s = w->pending;
    w->pending = NULL;
    close_fd(&w->hello); /* whatever was begun reads its end */
    drop(w->fds, w->nfds);
    w->nfds = 0;
    report_error(s->lease, f);
    if (s->pid > 0) {
        kill(s->pid, SIGKILL);
        return; /* reaped like any other */
    }
    s->pid = -1; /* what is left of its cgroups goes with the next look */
    z->removing++;
}

/* Takes all that ever came from them along; the kernel waits for each before it is dead itself. */
void template_end(const struct warm *w)
{
    if (w->reaper > 0)
        kill(w->reaper, SIGKILL);
}

static int host_of(const struct zygote *z, const struct template *t)
{
    return t->host >= 0 ? t->host : z->control;
}

/* One message and its sender; 0: the end, -1: none. The kernel vouches for the pid. */
static ssize_t hear(int sock, void *buffer, size_t size, pid_t *from)
{
    struct iovec iov = {.iov_base = buffer, .iov_len = size};
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = sizeof(control.space)};
    struct ucred who;
    *from = 0;
    ssize_t n = recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS) {
        memcpy(&who, CMSG_DATA(c), sizeof(who));
        *from = who.pid;
    }
    return n;
}

static bool is_our_child(pid_t pid)
{
    siginfo_t si = {0};
    return pid > 0 && waitid(P_PID, (id_t)pid, &si, WEXITED | WNOHANG | WNOWAIT) == 0;
}

static void heard_of(struct template *t, pid_t pid)
{
    t->begun = true;
    if (t->pid == 0 && is_our_child(pid))
        t->pid = pid;
}

/* Its first words may have come just now: who it is, before nobody knows any more whom to kill. One
 * that has said nothing yet cannot any more, and ends for that. */
static void meet(struct template *t)
{
    char text[64];
    pid_t from;
    if (t->sock < 0 || t->begun)
        return;
    shutdown(t->sock, SHUT_RD); /* what is in the queue stays */
    if (hear(t->sock, text, sizeof(text), &from) > 0)
        heard_of(t, from);
}

/* A template is dead, or as good as that. */
static void forget(struct zygote *z, struct template *t)
{
    struct failure f = {0};
    meet(t);
    errno = ECHILD;
    /* Its parent could not fork, or died before that: no fault of its imports. */
    fail(&f, t->begun ? "template" : "fork of the template");
    if (!t->ready)
        report_error(host_of(z, t), &f);
    close_fd(&t->sock);
    close_fd(&t->host);
    if (t->pid > 0)
        kill(t->pid, SIGKILL);
    if (z->warm.pending && t == &z->warm.templates[z->warm.pending->template])
        give_up(z, &f);
    t->ready = false;
}

/* What the cell is sent when it says hello. Copies: the caller closes its own. */
static int prepare(struct warm *w, struct cell *cell, struct failure *f)
{
    wire_begin(&w->message, message_buffer, sizeof(message_buffer), MSG_CELL);
    cell->config_fd = w->config;
    if (cell_pack(cell, true, &w->message, w->fds, &w->nfds) < 0) {
        errno = EMSGSIZE;
        w->nfds = 0;
        return fail(f, "cell");
    }
    for (unsigned i = 0; i < w->nfds; i++)
        if ((w->fds[i] = fcntl(w->fds[i], F_DUPFD_CLOEXEC, 3)) < 0) {
            w->nfds = i;
            return fail(f, "cell's descriptors");
        }
    return 0;
}

static int ask(struct warm *w, const struct template *t, struct failure *f)
{
    char buffer[64];
    struct writer out;
    cleanup_close int theirs = -1;
    if (template_pair(&w->hello, &theirs, f) < 0)
        return -1;
    wire_begin(&out, buffer, sizeof(buffer), MSG_FORK);
    return wire_send(t->sock, &out, theirs, MSG_DONTWAIT) < 0 ? fail(f, "template") : 0;
}

int template_ask(struct zygote *z, struct slot *s, struct cell *cell, struct failure *f)
{
    struct warm *w = &z->warm;
    const struct template *t = &w->templates[cell->template];
    if (t->sock < 0 || !t->ready) {
        errno = ECHILD;
        return fail(f, "template");
    }
    cell->warm = true;
    int result = cgroup_open(cell, f);
    if (result == 0 && ((result = prepare(w, cell, f)) < 0 || (result = ask(w, t, f)) < 0)) {
        drop(w->fds, w->nfds);
        w->nfds = 0;
        close_fd(&w->hello);
    }
    cgroup_close(cell);
    if (result < 0)
        return -1;
    s->pid = -2;
    s->template = cell->template;
    w->pending = s;
    w->deadline = now_ns() + PATIENCE_NS;
    return 0;
}

/* A pid that another cell or a template has is none: what says so is no init of ours. */
static bool is_taken(const struct zygote *z, pid_t pid)
{
    for (unsigned i = 0; i < MAX_TEMPLATES; i++)
        if (z->warm.templates[i].pid == pid)
            return true;
    for (uint32_t i = 0; i < z->config.slots; i++)
        if (z->slots[i].pid == pid)
            return true;
    return false;
}

static void greet(struct zygote *z)
{
    char text[64];
    struct failure f = {0};
    struct warm *w = &z->warm;
    struct slot *s = w->pending;
    pid_t pid;
    ssize_t heard = hear(w->hello, text, sizeof(text), &pid);
    if (heard > 0 && is_our_child(pid) && !is_taken(z, pid)) {
        s->pid = pid;
        z->live++;
        if (write_maps(z, s, &f) == 0) {
            if (wire_send_fds(w->hello, &w->message, w->fds, w->nfds, MSG_DONTWAIT) == 0) {
                close_fd(&w->hello);
                drop(w->fds, w->nfds);
                w->nfds = 0;
                w->pending = NULL;
                return;
            }
            fail(&f, "send cell");
        }
        if (f.error == EPERM) /* its namespace is not below ours, or has its maps already */
            forget(z, &w->templates[s->template]);
        else
            give_up(z, &f);
    } else if (heard == 0 && now_ns() <= w->deadline) {
        /* It could not fork, or what it forked did not come far: this cell's misfortune. */
        errno = ECHILD;
        fail(&f, "fork of the template");
        give_up(z, &f);
    } else
        forget(z, &w->templates[s->template]); /* it does not do what it is for */
}

static bool is_error(const char *message, size_t size)
{
    struct header h;
    if (size < sizeof(h))
        return false;
    memcpy(&h, message, sizeof(h));
    return h.magic == WIRE_MAGIC && h.version == WIRE_VERSION && h.type == MSG_ERROR &&
           h.flags == 0 && h.length == size - sizeof(h);
}

/* Reads one message; false: there is none. */
static bool listen_to(struct zygote *z, struct template *t)
{
    static char buffer[8192], out[sizeof(buffer) + 64];
    struct writer w;
    pid_t from;
    ssize_t n = hear(t->sock, buffer, sizeof(buffer) - 1, &from);
    if (n < 0 && errno == EAGAIN)
        return false;
    if (n <= 0) {
        forget(z, t);
        return false;
    }
    if (t->ready) { /* it has nothing more to say, and our time for hearing it is in no account */
        forget(z, t);
        return false;
    }
    heard_of(t, from);
    bool first = !t->spoken;
    t->spoken = true;
    if (n == 1 && buffer[0] == 'R') {
        t->ready = true;
        wire_begin(&w, out, sizeof(out), MSG_READY);
        wire_put_u64(&w, TAG_PID, (uint64_t)t->pid);
    } else if (first && t == z->warm.templates && is_error(buffer, (size_t)n)) {
        /* It failed before it was an interpreter: later it is what is preloaded that speaks. */
        (void)!send(host_of(z, t), buffer, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL);
        return true;
    } else {
        wire_begin(&w, out, sizeof(out), MSG_PRELOAD);
        wire_put(&w, TAG_TEXT, 0, buffer, (size_t)n);
    }
    wire_send(host_of(z, t), &w, -1, MSG_DONTWAIT);
    return true;
}

void template_reaped(struct zygote *z, pid_t pid)
{
    if (pid == z->warm.reaper)
        z->warm.reaper = 0;
    for (unsigned i = 0; z->config.template_args && i < MAX_TEMPLATES; i++) {
        struct template *t = &z->warm.templates[i];
        if (t->pid != pid)
            continue;
        t->pid = 0;
        /* Its last words; what it has forked may go on. */
        for (int n = 0; n < 1024 && t->sock >= 0 && listen_to(z, t); n++)
            ;
        if (t->sock >= 0)
            forget(z, t);
    }
}

void template_poll(const struct warm *w, struct pollfd *p)
{
    *p++ = (struct pollfd){.fd = w->pending ? w->hello : -1, .events = POLLIN};
    for (unsigned i = 0; i < MAX_TEMPLATES; i++) {
        *p++ = (struct pollfd){.fd = w->templates[i].sock, .events = POLLIN};
        *p++ = (struct pollfd){.fd = w->templates[i].host};
    }
}

void template_serve(struct zygote *z, const struct pollfd *p)
{
    struct warm *w = &z->warm;
    if (w->pending && (p->revents || now_ns() > w->deadline))
        greet(z);
    for (unsigned i = 0; i < MAX_TEMPLATES; i++) {
        struct template *t = &w->templates[i];
        if (t->sock >= 0 && p[1 + 2 * i].revents)
            listen_to(z, t);
        if (t->host >= 0 && p[2 + 2 * i].revents)
            forget(z, t); /* nobody wants it any more */
    }
}

static bool is_dead(const struct template *t)
{
    char byte;
    return t->sock < 0 || !t->ready || recv(t->sock, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

static int branch(struct zygote *z, int host, struct reader *r, struct failure *f)
{
    static char buffer[16384];
    struct field fl;
    struct writer out;
    uint64_t number = MAX_TEMPLATES, from = MAX_TEMPLATES;
    int more;
    wire_begin(&out, buffer, sizeof(buffer), MSG_BRANCH);
    while ((more = wire_next(r, &fl)) > 0) {
        if (fl.tag == TAG_TEMPLATE_ARG)
            wire_put(&out, fl.tag, 0, fl.data, fl.length);
        else if (!wire_u64(&fl, fl.tag == TAG_TEMPLATE ? &number : &from))
            more = -1;
        if (more < 0)
            break;
    }
    errno = EBADMSG;
    if (more < 0 || out.full || number >= MAX_TEMPLATES || from >= MAX_TEMPLATES)
        return fail(f, "branch");
    struct template *t = &z->warm.templates[number], *parent = &z->warm.templates[from];
    errno = EBUSY;
    if (t->sock >= 0 || t->pid)
        return fail(f, "branch");
    errno = ECHILD;
    if (is_dead(parent))
        return fail(f, "parent");
    cleanup_close int theirs = -1;
    *t = (struct template){.sock = -1, .host = host};
    if (template_pair(&t->sock, &theirs, f) < 0 ||
        (wire_send(parent->sock, &out, theirs, MSG_DONTWAIT) < 0 && fail(f, "parent"))) {
        close_fd(&t->sock);
        t->host = -1;
        return -1;
    }
    return 0;
}

void template_branch(struct zygote *z, int host, struct reader *r)
{
    struct failure f = {0};
    if (branch(z, host, r, &f) < 0) {
        report_error(host, &f);
        close(host);
    }
}
