/* The zygote's reading of what a template says, and of the host's request for another one. */
#include "../isojob/native/branch.c"

#include "targets.h"

static struct zygote zygote;
static int host = -1, template = -1; /* the other ends */

static void set_up(void)
{
    struct warm *w = &zygote.warm;
    struct failure f = {0};
    if (host < 0) {
        if (template_pair(&zygote.control, &host, &f) < 0)
            abort();
        for (unsigned i = 0; i < MAX_TEMPLATES; i++)
            w->templates[i] = (struct template){.sock = -1, .host = -1};
    }
    if (w->templates[0].sock < 0) {
        close_fd(&template);
        if (template_pair(&w->templates[0].sock, &template, &f) < 0)
            abort();
    }
}

/* Whatever was sent there is a message; how many, and the last one's type. */
static unsigned drain(int sock, uint16_t *type)
{
    static char buffer[32768];
    struct header h;
    struct reader r;
    int fds[WIRE_MAX_FDS], n;
    unsigned nfds, messages = 0;
    while ((n = wire_receive(sock, buffer, sizeof(buffer), &h, &r, fds, &nfds, MSG_DONTWAIT)) > 0) {
        drop(fds, nfds);
        *type = h.type;
        messages++;
    }
    if (n < 0 && errno != EAGAIN)
        abort();
    return messages;
}

int fuzz_template(const uint8_t *data, size_t size)
{
    set_up();
    struct template *t = &zygote.warm.templates[0];
    uint16_t type = 0;
    if (size == 0 || send(template, data, size, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        return -1;
    t->ready = false;
    listen_to(&zygote, t);
    if (drain(host, &type) != 1 ||
        (type != MSG_READY && type != MSG_PRELOAD && type != MSG_ERROR) ||
        (type == MSG_READY) != t->ready)
        abort();
    return 0;
}

int fuzz_branch(const uint8_t *data, size_t size)
{
    set_up();
    struct warm *w = &zygote.warm;
    struct failure f = {0};
    struct reader r = {.at = data, .end = data + size};
    uint16_t type = 0;
    w->templates[0].ready = true;
    int result = branch(&zygote, -1, &r, &f);
    if (drain(template, &type) != (result == 0) || (result == 0 && type != MSG_BRANCH))
        abort();
    unsigned born = 0;
    for (unsigned i = 1; i < MAX_TEMPLATES; i++) {
        born += w->templates[i].sock >= 0;
        close_fd(&w->templates[i].sock);
    }
    if (born != (result == 0))
        abort();
    return result;
}
