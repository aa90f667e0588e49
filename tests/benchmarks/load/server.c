/* A server that costs next to nothing: it lets everybody in, and answers each query with one row of one column, the
 * number of the connection. It holds as many sessions as there are descriptors.
 *
 *   server DIRECTORY
 *
 * listens on a free port of the loopback address and on DIRECTORY/.s.PGSQL.PORT, and prints the port. It ends with its
 * standard input. Messages are those of PostgreSQL's documentation, chapter "Message Formats".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { EVENTS = 256, READ = 65536, WRITE = 4 * READ };

struct connection {
    char *part;     /* of a message that hasn't arrived whole */
    uint32_t size;  /* of that part */
    uint32_t number;
    int begun; /* it has been let in */
};

static struct connection *connections;
static char input[2 * READ], output[WRITE];
static size_t filled;
static uint32_t numbers;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint32_t length_at(const char *at) {
    uint32_t n;
    memcpy(&n, at, 4);
    return ntohl(n);
}

static void put(const void *bytes, size_t size) {
    memcpy(output + filled, bytes, size);
    filled += size;
}

static void put32(uint32_t n) {
    n = htonl(n);
    put(&n, 4);
}

static void message(char type, const void *body, size_t size) {
    put(&type, 1);
    put32(size + 4);
    put(body, size);
}

static void parameter(const char *name, const char *value) {
    char body[128];
    int size = snprintf(body, sizeof body, "%s%c%s", name, 0, value) + 1;
    message('S', body, size);
}

static void ready(void) { message('Z', "I", 1); }

static void let_in(struct connection *c) {
    message('R', "\0\0\0\0", 4);
    /* What PostgreSQL 15 reports. */
    parameter("application_name", "");
    parameter("client_encoding", "UTF8");
    parameter("DateStyle", "ISO, MDY");
    parameter("default_transaction_read_only", "off");
    parameter("in_hot_standby", "off");
    parameter("integer_datetimes", "on");
    parameter("IntervalStyle", "postgres");
    parameter("is_superuser", "on");
    parameter("server_encoding", "UTF8");
    parameter("server_version", "15.0");
    parameter("session_authorization", "postgres");
    parameter("standard_conforming_strings", "on");
    parameter("TimeZone", "Etc/UTC");
    uint32_t key[2] = {htonl(c->number), htonl(c->number ^ 0x5bd1e995)};
    message('K', key, 8);
    ready();
    c->begun = 1;
}

static void description(void) {
    static const char row[] = "\0\1abalance\0\0\0\0\0\0\0\0\0\0\x17\0\4\xff\xff\xff\xff\0";
    message('T', row, sizeof row); /* with the NUL of the literal: the second byte of the format */
}

static void row(struct connection *c) {
    char body[6 + 10 + 1];
    memcpy(body, "\0\1\0\0\0\x0a", 6);
    snprintf(body + 6, 11, "%010u", c->number);
    message('D', body, 16);
    message('C', "SELECT 1", 9);
}

/* Answer one message; false ends the connection. */
static int answer(struct connection *c, const char *at) {
    if (!c->begun) {
        switch (length_at(at + 4)) {
        case 80877103: /* SSLRequest */
        case 80877104: /* GSSENCRequest */
            put("N", 1);
            return 1;
        case 80877102: /* CancelRequest */
            return 0;
        default:
            let_in(c);
            return 1;
        }
    }
    switch (*at) {
    case 'Q':
        description();
        row(c);
        ready();
        return 1;
    case 'P':
        message('1', "", 0);
        return 1;
    case 'B':
        message('2', "", 0);
        return 1;
    case 'D':
        description();
        return 1;
    case 'E':
        row(c);
        return 1;
    case 'C':
        message('3', "", 0);
        return 1;
    case 'S':
        ready();
        return 1;
    case 'X':
        return 0;
    default:
        return 1;
    }
}

static int flush(int fd) {
    for (size_t sent = 0; sent < filled;) {
        ssize_t n = send(fd, output + sent, filled - sent, MSG_NOSIGNAL);
        if (n > 0) {
            sent += n;
        } else if (errno == EAGAIN) {
            struct pollfd wait = {fd, POLLOUT, 0};
            poll(&wait, 1, -1);
        } else {
            return 0;
        }
    }
    filled = 0;
    return 1;
}

static int serve(int fd, struct connection *c) {
    memcpy(input, c->part, c->size);
    ssize_t n = recv(fd, input + c->size, READ, 0);
    if (n < 0 && errno == EAGAIN)
        return 1;
    if (n <= 0)
        return 0;
    char *at = input, *end = input + c->size + n;
    filled = 0;
    for (;;) {
        size_t left = end - at, head = c->begun ? 1 : 0;
        if (left < head + 4 || (!c->begun && left < 8))
            break;
        size_t size = head + length_at(at + head);
        if (size > READ) {
            fprintf(stderr, "server: a message of %zu bytes\n", size);
            return 0;
        }
        if (left < size)
            break;
        int go_on = answer(c, at);
        if (!go_on) {
            flush(fd);
            return 0;
        }
        at += size;
        if (filled > WRITE / 2 && !flush(fd))
            return 0;
    }
    free(c->part);
    c->part = NULL;
    if ((c->size = end - at)) {
        c->part = malloc(c->size);
        memcpy(c->part, at, c->size);
    }
    return flush(fd);
}

static void watch(int poller, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: server DIRECTORY\n");
        return 2;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    connections = calloc(limit.rlim_max, sizeof *connections);

    int tcp = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(tcp, (struct sockaddr *)&address, size) || listen(tcp, 4096))
        die("listen");
    getsockname(tcp, (struct sockaddr *)&address, &size);

    int local = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    snprintf(path.sun_path, sizeof path.sun_path, "%s/.s.PGSQL.%d", argv[1], ntohs(address.sin_port));
    if (bind(local, (struct sockaddr *)&path, sizeof path) || listen(local, 4096))
        die(path.sun_path);
    chmod(path.sun_path, 0666);

    int poller = epoll_create1(0);
    watch(poller, tcp);
    watch(poller, local);
    watch(poller, STDIN_FILENO);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, -1);
        if (count < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == STDIN_FILENO)
                return 0;
            if (fd == tcp || fd == local) {
                int client, on = 1;
                while ((client = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (fd == tcp)
                        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    connections[client] = (struct connection){.number = ++numbers};
                    watch(poller, client);
                }
                if (errno != EAGAIN && errno != ECONNABORTED)
                    die("accept");
            } else if (!serve(fd, &connections[fd])) {
                free(connections[fd].part);
                connections[fd].part = NULL;
                connections[fd].size = 0;
                close(fd);
            }
        }
    }
}
