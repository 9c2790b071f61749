/* libFuzzer's entry. The first byte says which parser gets the rest. */
#include <sys/mman.h>
#include <sys/socket.h>

#include "../isojob/native/zygote.h"
#include "targets.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int fuzz_config(const uint8_t *data, size_t size)
{
    static struct config config;
    /* Numbers that are no descriptors: what is closed by mistake is nobody's. */
    static const int fds[8] = {1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007};
    /* As the zygote reads it, and as a template and init do. */
    const int *const given[] = {fds, NULL};
    for (size_t i = 0; i < ARRAY_LEN(given); i++) {
        struct failure f = {0};
        struct reader r = {.at = data, .end = data + size};
        config_parse(&config, &r, given[i], given[i] ? ARRAY_LEN(fds) : 0, &f);
        free(config.filter.filter);
        free(config.template_filter.filter);
    }
    return 0;
}

static int fuzz_fields(const uint8_t *data, size_t size)
{
    struct reader r = {.at = data, .end = data + size};
    struct field f;
    const char *first, *second;
    const uint8_t *bytes;
    size_t len, sum = 0;
    uint64_t value;
    while (wire_next(&r, &f) > 0) {
        if ((first = wire_string(&f)))
            sum += strlen(first);
        if (wire_pair(&f, &first, &second))
            sum += strlen(first) + strlen(second);
        if (wire_path_bytes(&f, &first, &bytes, &len))
            sum += strlen(first) + (len ? bytes[len - 1] : 0);
        sum += wire_u64(&f, &value);
    }
    (void)sum;
    return 0;
}

/* The first byte: how many descriptors come along. */
static int fuzz_receive(const uint8_t *data, size_t size)
{
    static char buffer[sizeof(struct header) + WIRE_INLINE_MAX], message[sizeof(buffer)];
    static int pair[2] = {-1, -1};
    static const int zeros[WIRE_MAX_FDS];
    struct writer w = {.buffer = (uint8_t *)message, .size = sizeof(message)};
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    if (pair[0] < 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        abort();
    if (size < sizeof(h))
        return -1;
    memcpy(message, data + 1, w.used = size - 1);
    /* With descriptors the length is set right; without, it is what it is. */
    unsigned sent = data[0] % WIRE_MAX_FDS;
    if (sent ? wire_send_fds(pair[0], &w, zeros, sent, MSG_DONTWAIT) < 0
             : send(pair[0], message, w.used, MSG_DONTWAIT) < 0)
        abort();
    if (wire_receive(pair[1], buffer, sizeof(buffer), &h, &r, fds, &nfds, MSG_DONTWAIT) > 0) {
        fuzz_fields(r.at, (size_t)(r.end - r.at));
        for (unsigned i = 0; i < nfds; i++)
            close(fds[i]);
    }
    return 0;
}

/* A body in a memfd; the first two bytes: how long it is said to be. */
static int fuzz_map(const uint8_t *data, size_t size)
{
    struct reader r;
    uint16_t length;
    if (size < sizeof(length))
        return -1;
    memcpy(&length, data, sizeof(length));
    cleanup_close int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write_all(fd, data + sizeof(length), size - sizeof(length)) < 0)
        abort();
    if (wire_map(fd, length, &r) < 0)
        return -1;
    fuzz_fields(r.at, (size_t)(r.end - r.at));
    munmap((void *)r.at, (size_t)(r.end - r.at));
    return 0;
}

static int (*const targets[])(const uint8_t *data, size_t size) = {
    fuzz_config, fuzz_make,   fuzz_job,     fuzz_counters, fuzz_receive, fuzz_fields,
    fuzz_map,    fuzz_writes, fuzz_cell,    fuzz_collect,  fuzz_session, fuzz_template,
    fuzz_branch, fuzz_names,  fuzz_rlimits, fuzz_mounts,   fuzz_plan,    fuzz_files,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    /* On the heap and of its exact size: a byte too far is seen. */
    size_t length = size - 1;
    uint8_t *copy = malloc(length ? length : 1);
    if (!copy)
        return 0;
    memcpy(copy, data + 1, length);
    targets[data[0] % ARRAY_LEN(targets)](copy, length);
    free(copy);
    /* What is left open again and again is no longer a low number. */
    int fd = dup(0);
    if (fd > 200)
        abort();
    close(fd);
    return 0;
}
