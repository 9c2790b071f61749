/* init of a warm cell. The template has cloned it, and it begins with an execve of our own executable:
 * what keeps the accounts and the time of a job has nothing of the template's memory. */
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "zygote.h"

static int read_config(struct cell *cell, struct config *c, struct failure *f)
{
    struct reader r;
    if (cell->config_fd < 0 || wire_map(cell->config_fd, 0, &r) < 0)
        return fail(f, "configuration");
    close_fd(&cell->config_fd);
    return config_parse(c, &r, NULL, 0, f);
}

static int share_page(struct cell *cell, struct failure *f)
{
    cell->shared_fd = memfd_create("isojob-cell", MFD_CLOEXEC);
    if (cell->shared_fd < 0 || ftruncate(cell->shared_fd, 4096) < 0)
        return fail(f, "shared page");
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, cell->shared_fd, 0);
    if (page == MAP_FAILED)
        return fail(f, "shared page");
    cell->shared = page;
    return 0;
}

static int become_init(struct cell *cell, struct config *c, int sock, struct failure *f)
{
    struct writer w;
    char hello[64];
    /* The zygote learns our pid from the credentials that the kernel attaches. */
    wire_begin(&w, hello, sizeof(hello), MSG_HELLO);
    if (wire_send(sock, &w, -1, 0) < 0 || cell_receive(sock, cell, f) < 0)
        _exit(1);
    close(sock);
    if (read_config(cell, c, f) < 0 || share_page(cell, f) < 0 || init_equip(cell, NULL, f) < 0)
        return -1;
    if (cell_send(cell->channel, cell, false) < 0)
        return fail(f, "send cell");
    close_fd(&cell->out[0]);
    close_fd(&cell->out[1]);
    close_fd(&cell->shared_fd);
    if (masks_refresh(c, f) < 0)
        return -1;
    init_shed_prepare();
    /* Hooks of what was preloaded run before the launcher speaks. */
    const struct timeval patience = {.tv_sec = 30};
    if (setsockopt(cell->channel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) < 0)
        return fail(f, "launcher's socket");
    return init_settle(cell, f);
}

_Noreturn void init_execute(int sock, int channel)
{
    static struct config config;
    struct failure f = {0};
    struct cell cell;
    cell_clear(&cell, &config);
    cell.channel = channel;
    cell.warm = true;
    cell.job = 2; /* the first that its pid 1 has forked */
    prctl(PR_SET_NAME, "isojob-init");
    if (become_init(&cell, &config, sock, &f) < 0) {
        report_error(cell.lease, &f);
        _exit(1);
    }
    init_serve(&cell);
}
