/* libFuzzer's entry. The first byte says which parser gets the rest. */
#include <sys/socket.h>

#include "../isojob/native/zygote.h"
#include "targets.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_config(const uint8_t *data, size_t size)
{
    static struct config config;
    struct failure f = {0};
    struct reader r = {.at = data, .end = data + size};
    /* Numbers that are no descriptors: what is closed by mistake is nobody's. */
    static const int fds[8] = {1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007};
    memset(&config, 0, sizeof(config));
    config_parse(&config, &r, fds, ARRAY_LEN(fds), &f);
}

static void fuzz_fields(const uint8_t *data, size_t size)
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
}

static void fuzz_receive(const uint8_t *data, size_t size)
{
    static char buffer[sizeof(struct header) + WIRE_INLINE_MAX];
    static int pair[2] = {-1, -1};
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS];
    unsigned nfds;
    if (pair[0] < 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        abort();
    if (size == 0 || send(pair[0], data, size, MSG_DONTWAIT) < 0)
        return;
    if (wire_receive(pair[1], buffer, sizeof(buffer), &h, &r, fds, &nfds, MSG_DONTWAIT) > 0)
        fuzz_fields(r.at, (size_t)(r.end - r.at));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t which = data[0] % 6;
    /* On the heap and of its exact size: a byte too far is seen. */
    size_t length = size - 1;
    uint8_t *copy = malloc(length ? length : 1);
    if (!copy)
        return 0;
    memcpy(copy, data + 1, length);
    switch (which) {
    case 0:
        fuzz_config(copy, length);
        break;
    case 1:
        fuzz_make(copy, length);
        break;
    case 2:
        fuzz_job(copy, length);
        break;
    case 3:
        fuzz_counters(copy, length);
        break;
    case 4:
        fuzz_receive(copy, length);
        break;
    default:
        fuzz_fields(copy, length);
    }
    free(copy);
    return 0;
}
