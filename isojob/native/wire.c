#include "wire.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "util.h"

int wire_next(struct reader *r, struct field *f)
{
    size_t left = (size_t)(r->end - r->at);
    if (left == 0)
        return 0;
    if (left < 8)
        return -1;
    memcpy(&f->tag, r->at, 2);
    memcpy(&f->index, r->at + 2, 2);
    memcpy(&f->length, r->at + 4, 4);
    if (f->length > left - 8)
        return -1;
    f->data = r->at + 8;
    r->at += 8 + (size_t)f->length;
    return 1;
}

const char *wire_string(const struct field *f)
{
    if (f->length == 0 || memchr(f->data, 0, f->length) != f->data + f->length - 1)
        return NULL;
    return (const char *)f->data;
}

bool wire_path_bytes(const struct field *f, const char **path, const uint8_t **data, size_t *len)
{
    const uint8_t *nul = f->length ? memchr(f->data, 0, f->length) : NULL;
    if (nul == NULL)
        return false;
    *path = (const char *)f->data;
    *data = nul + 1;
    *len = (size_t)(f->data + f->length - *data);
    return true;
}

bool wire_pair(const struct field *f, const char **first, const char **second)
{
    const uint8_t *data;
    size_t len;
    if (!wire_path_bytes(f, first, &data, &len) || len == 0 ||
        memchr(data, 0, len) != data + len - 1)
        return false;
    *second = (const char *)data;
    return true;
}

bool wire_u64(const struct field *f, uint64_t *value)
{
    if (f->length != 8)
        return false;
    memcpy(value, f->data, 8);
    return true;
}

void wire_begin(struct writer *w, void *buffer, size_t size, uint16_t type)
{
    struct header h = {.magic = WIRE_MAGIC, .version = WIRE_VERSION, .type = type};
    *w = (struct writer){.buffer = buffer, .size = size, .used = sizeof(h)};
    memcpy(buffer, &h, sizeof(h));
}

void wire_put(struct writer *w, uint16_t tag, uint16_t index, const void *data, size_t len)
{
    uint32_t length = (uint32_t)len;
    if (w->full || len > w->size || w->size - w->used < len + 8) {
        w->full = true;
        return;
    }
    memcpy(w->buffer + w->used, &tag, 2);
    memcpy(w->buffer + w->used + 2, &index, 2);
    memcpy(w->buffer + w->used + 4, &length, 4);
    if (len)
        memcpy(w->buffer + w->used + 8, data, len);
    w->used += len + 8;
}

void wire_put_string(struct writer *w, uint16_t tag, uint16_t index, const char *s)
{
    wire_put(w, tag, index, s, strlen(s) + 1);
}

void wire_put_u64(struct writer *w, uint16_t tag, uint64_t value)
{
    wire_put(w, tag, 0, &value, sizeof(value));
}

int wire_send_fds(int sock, struct writer *w, const int *fds, unsigned nfds, int flags)
{
    uint32_t length = (uint32_t)(w->used - sizeof(struct header));
    struct iovec iov = {.iov_base = w->buffer, .iov_len = w->used};
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(WIRE_MAX_FDS * sizeof(int))];
    } control;
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nfds > WIRE_MAX_FDS) {
        errno = EMSGSIZE;
        return -1;
    }
    memcpy(w->buffer + offsetof(struct header, length), &length, 4);
    if (nfds) {
        memset(&control, 0, CMSG_SPACE(nfds * sizeof(int)));
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    ssize_t n;
    do
        n = sendmsg(sock, &msg, flags | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -1 : 0;
}

int wire_send(int sock, struct writer *w, int fd, int flags)
{
    return wire_send_fds(sock, w, &fd, fd >= 0, flags);
}

int wire_receive(int sock, void *buffer, size_t size, struct header *h, struct reader *r, int *fds,
                 unsigned *nfds, int flags)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(WIRE_MAX_FDS * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = buffer, .iov_len = size};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control.space,
                         .msg_controllen = sizeof(control.space)};
    unsigned n = 0;
    ssize_t got;
    *nfds = 0;
    do
        got = recvmsg(sock, &msg, flags | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            size_t bytes = c->cmsg_len - CMSG_LEN(0);
            for (size_t i = 0; i + sizeof(int) <= bytes && n < WIRE_MAX_FDS; i += sizeof(int))
                memcpy(&fds[n++], CMSG_DATA(c) + i, sizeof(int));
        }
    if (got == 0 && n == 0) {
        errno = 0;
        return 0;
    }
    bool ok = (size_t)got >= sizeof(*h) && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
    if (ok) {
        memcpy(h, buffer, sizeof(*h));
        ok = h->magic == WIRE_MAGIC && h->version == WIRE_VERSION &&
             ((h->flags & FLAG_MEMFD) ? n > 0 : h->length == (size_t)got - sizeof(*h));
    }
    if (!ok) {
        for (unsigned i = 0; i < n; i++)
            close(fds[i]);
        errno = EBADMSG;
        return -1;
    }
    r->at = (const uint8_t *)buffer + sizeof(*h);
    r->end = (const uint8_t *)buffer + got;
    *nfds = n;
    return (int)got;
}

int wire_map(int fd, size_t length, struct reader *r)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -1;
    if (length == 0)
        length = (size_t)st.st_size;
    if (length == 0 || (uint64_t)st.st_size < length) {
        errno = EBADMSG;
        return -1;
    }
    void *p = mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
        return -1;
    r->at = p;
    r->end = r->at + length;
    return 0;
}
