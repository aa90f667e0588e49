/* Clients that cost next to nothing, so that what is measured is what stands between them and the server.
 *
 *   client ADDRESS ask N SECONDS simple|prepared SQL   N sessions ask one after the other, as fast as they are answered
 *   client ADDRESS come SECONDS SQL                    one session after the other is opened, asks once, and ends
 *   client ADDRESS rows SECONDS SQL                    one session asks, and reads what may be many rows
 *   client ADDRESS copy SECONDS SIZE ROW SQL           one session sends rows of ROW bytes, in CopyData of SIZE bytes
 *   client ADDRESS hold N PROCESSES                    N idle sessions, held by so many processes
 *
 * ADDRESS is a port of the loopback address, or the path of a Unix socket. The user and the database are postgres.
 *
 * "ask" prints the answers, the seconds, and of the latencies in microseconds the median, the 99th percentile and the
 * longest. "come" prints how many there were. "rows" and "copy" print the bytes and the seconds. "hold" waits for a
 * line, opens the sessions, asks in each, and prints how many have answered. With each further line it asks in each
 * again, and prints how many have answered as at first. It ends with its standard input. Sockets don't block, as those
 * of libpq.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
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
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { READ = 1 << 18, EVENTS = 256, WAIT_MS = 60000 };

/* Where in the stream of messages a session is. */
struct session {
    int fd;
    char head[5]; /* of a message whose head hasn't arrived whole */
    int have;     /* bytes of it */
    uint32_t rest; /* bytes of the body still to come */
    uint64_t sum;  /* of the bodies of the rows of this answer */
    int64_t asked; /* when, in nanoseconds */
};

static const char *address;
static char input[READ];

static void die(const char *what) {
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void complain(const char *what) {
    fprintf(stderr, "client: %s\n", what);
    exit(1);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int await(int fd, int event) {
    struct pollfd wait = {fd, event, 0};
    int count;
    while ((count = poll(&wait, 1, WAIT_MS)) < 0 && errno == EINTR) {
    }
    if (!count)
        errno = ETIMEDOUT;
    return count > 0;
}

/* Send all of it; false if the connection is gone. */
static int send_all(int fd, const char *bytes, size_t size) {
    while (size) {
        ssize_t n = send(fd, bytes, size, MSG_NOSIGNAL);
        if (n > 0) {
            bytes += n;
            size -= n;
        } else if (errno != EAGAIN || !await(fd, POLLOUT)) {
            return 0;
        }
    }
    return 1;
}

/* Follow what has come; the number of messages of type stop in it. An error of the server's ends the program. */
static int follow(struct session *s, const char *at, size_t size, char stop) {
    const char *end = at + size;
    int found = 0;
    while (at < end) {
        if (s->have < 5) {
            if (!s->have && end - at >= 5) {
                memcpy(s->head, at, 5);
                s->have = 5;
                at += 5;
            } else {
                s->head[s->have++] = *at++;
                if (s->have < 5)
                    continue;
            }
            uint32_t n;
            memcpy(&n, s->head + 1, 4);
            s->rest = ntohl(n) - 4;
        }
        size_t part = (size_t)(end - at) < s->rest ? (size_t)(end - at) : s->rest;
        if (s->head[0] == 'E') {
            fprintf(stderr, "client: the server says %.*s\n", (int)part, at);
            exit(1);
        }
        if (s->head[0] == 'D' && part < 64)
            for (size_t i = 0; i < part; i++)
                s->sum = s->sum * 31 + (unsigned char)at[i];
        at += part;
        s->rest -= part;
        if (!s->rest) {
            found += s->head[0] == stop;
            s->have = 0;
        }
    }
    return found;
}

/* Read up to the next message of that type; how many bytes that were, 0 if the connection is gone. */
static uint64_t read_to(struct session *s, char stop) {
    uint64_t total = 0;
    for (;;) {
        ssize_t n = recv(s->fd, input, READ, 0);
        if (n > 0) {
            total += n;
            if (follow(s, input, n, stop))
                return total;
        } else if (n == 0 || errno != EAGAIN || !await(s->fd, POLLIN)) {
            return 0;
        }
    }
}

static size_t message(char *to, char type, const void *body, size_t size) {
    uint32_t n = htonl(size + 4);
    *to = type;
    memcpy(to + 1, &n, 4);
    memcpy(to + 5, body, size);
    return size + 5;
}

static size_t query(char *to, const char *sql) { return message(to, 'Q', sql, strlen(sql) + 1); }

static void dial(struct session *s) {
    static const char startup[] = "\0\0\0\0\0\3\0\0user\0postgres\0database\0postgres\0application_name\0bench\0";
    memset(s, 0, sizeof *s);
    if (address[0] == '/') {
        struct sockaddr_un to = {.sun_family = AF_UNIX};
        strncpy(to.sun_path, address, sizeof to.sun_path - 1);
        if ((s->fd = socket(AF_UNIX, SOCK_STREAM, 0)) < 0 || connect(s->fd, (struct sockaddr *)&to, sizeof to))
            die("connect");
        fcntl(s->fd, F_SETFL, O_NONBLOCK);
    } else {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int on = 1;
        to.sin_port = htons(atoi(address));
        if ((s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0)
            die("socket");
        setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (connect(s->fd, (struct sockaddr *)&to, sizeof to) && (errno != EINPROGRESS || !await(s->fd, POLLOUT)))
            die("connect");
    }
    char first[sizeof startup];
    uint32_t n = htonl(sizeof startup);
    memcpy(first, startup, sizeof startup);
    memcpy(first, &n, 4);
    if (!send_all(s->fd, first, sizeof first) || !read_to(s, 'Z'))
        die("login");
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void ask(int count, double seconds, int prepared, const char *sql) {
    size_t room = 1 << 20, answers = 0, size = 0;
    uint32_t *latencies = malloc(room * sizeof *latencies);
    struct session *sessions = calloc(count, sizeof *sessions);
    char request[4096];
    if (prepared) {
        /* The unnamed portal of statement s; no formats, no values, no formats. */
        size += message(request + size, 'B', "\0s\0\0\0\0\0\0", 9);
        size += message(request + size, 'D', "P", 2);
        size += message(request + size, 'E', "\0\0\0\0", 5);
        size += message(request + size, 'S', "", 0);
    } else {
        size = query(request, sql);
    }
    for (int i = 0; i < count; i++) {
        dial(&sessions[i]);
        if (prepared) {
            char first[4096], body[2048];
            int length = snprintf(body, sizeof body, "s%c%s%c%c%c", 0, sql, 0, 0, 0);
            size_t n = message(first, 'P', body, length);
            n += message(first + n, 'S', "", 0);
            if (!send_all(sessions[i].fd, first, n) || !read_to(&sessions[i], 'Z'))
                die("prepare");
        }
    }
    int poller = epoll_create1(0);
    int64_t begin = now(), until = begin + (int64_t)(seconds * 1e9), at = begin;
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &sessions[i]};
        epoll_ctl(poller, EPOLL_CTL_ADD, sessions[i].fd, &event);
        sessions[i].asked = now();
        if (!send_all(sessions[i].fd, request, size))
            die("send");
    }
    for (int open = count; open;) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, WAIT_MS);
        if (!ready)
            complain("no answer within a minute");
        for (int i = 0; i < ready; i++) {
            struct session *s = events[i].data.ptr;
            ssize_t n = recv(s->fd, input, READ, 0);
            if (n < 0 && errno == EAGAIN)
                continue;
            if (n <= 0)
                complain("a session was lost");
            if (!follow(s, input, n, 'Z'))
                continue;
            at = now();
            if (answers == room)
                latencies = realloc(latencies, (room *= 2) * sizeof *latencies);
            latencies[answers++] = (uint32_t)(at - s->asked);
            if (at >= until) {
                open--;
                continue;
            }
            s->asked = at;
            if (!send_all(s->fd, request, size))
                die("send");
        }
    }
    qsort(latencies, answers, sizeof *latencies, by_size);
    printf("%zu %.6f %.3f %.3f %.3f\n", answers, (at - begin) / 1e9, latencies[answers / 2] / 1e3,
           latencies[answers * 99 / 100] / 1e3, latencies[answers - 1] / 1e3);
    for (int i = 0; i < count; i++)
        send_all(sessions[i].fd, "X\0\0\0\4", 5);
}

static void come(double seconds, const char *sql) {
    char request[4096];
    size_t size = query(request, sql);
    long count = 0;
    int64_t until = now() + (int64_t)(seconds * 1e9);
    do {
        struct session s;
        dial(&s);
        if (!send_all(s.fd, request, size) || !read_to(&s, 'Z') || !send_all(s.fd, "X\0\0\0\4", 5))
            die("a session was lost");
        close(s.fd);
        count++;
    } while (now() < until);
    printf("%ld\n", count);
}

static void rows(double seconds, const char *sql) {
    struct session s;
    char request[4096];
    size_t size = query(request, sql);
    dial(&s);
    uint64_t total = 0;
    int64_t begin = now(), until = begin + (int64_t)(seconds * 1e9), at;
    do {
        uint64_t part = 0;
        if (!send_all(s.fd, request, size) || !(part = read_to(&s, 'Z')))
            die("a session was lost");
        total += part;
    } while ((at = now()) < until);
    printf("%llu %.6f\n", (unsigned long long)total, (at - begin) / 1e9);
    send_all(s.fd, "X\0\0\0\4", 5);
}

static void copy(double seconds, size_t width, size_t line_width, const char *sql) {
    enum { BLOCK = 65536 };
    struct session s;
    char request[4096], *block = malloc(BLOCK + width + 5), *line = malloc(width);
    size_t size = query(request, sql), filled = 0;
    memset(line, 'x', width);
    for (size_t at = line_width; at <= width; at += line_width)
        line[at - 1] = '\n';
    line[width - 1] = '\n';
    while (filled + width + 5 <= BLOCK)
        filled += message(block + filled, 'd', line, width);
    if (!filled)
        filled = message(block, 'd', line, width);
    dial(&s);
    uint64_t total = 0;
    if (!send_all(s.fd, request, size) || !read_to(&s, 'G'))
        die("COPY");
    int64_t begin = now(), until = begin + (int64_t)(seconds * 1e9), at;
    do {
        if (!send_all(s.fd, block, filled))
            die("a session was lost");
        total += filled;
    } while ((at = now()) < until);
    if (!send_all(s.fd, "c\0\0\0\4", 5) || !read_to(&s, 'Z'))
        die("the end of COPY");
    printf("%llu %.6f\n", (unsigned long long)total, (now() - begin) / 1e9);
    send_all(s.fd, "X\0\0\0\4", 5);
}

/* A process that holds some of the sessions: with each byte that it reads it asks, and writes how many have answered as
 * at first. */
static void holder(int count, int in, int out) {
    struct session *sessions = calloc(count, sizeof *sessions);
    uint64_t *first = calloc(count, sizeof *first);
    char request[64], order;
    size_t size = query(request, "SELECT pg_backend_pid()");
    for (int round = 0; read(in, &order, 1) == 1; round++) {
        int good = 0;
        for (int i = 0; i < count; i++) {
            struct session *s = &sessions[i];
            if (!round)
                dial(s);
            s->sum = 0;
            if (!send_all(s->fd, request, size) || !read_to(s, 'Z'))
                continue;
            if (!round)
                first[i] = s->sum;
            good += s->sum && s->sum == first[i];
        }
        if (write(out, &good, sizeof good) != sizeof good)
            die("write");
    }
    for (int i = 0; i < count; i++)
        send_all(sessions[i].fd, "X\0\0\0\4", 5);
    exit(0);
}

static void hold(int count, int processes) {
    int orders[2], answers[2];
    int(*in)[2] = calloc(processes, sizeof *in);
    if (pipe(answers))
        die("pipe");
    for (int p = 0; p < processes; p++) {
        if (pipe(orders))
            die("pipe");
        memcpy(in[p], orders, sizeof orders);
        int share = count / processes + (p < count % processes);
        if (!fork()) {
            for (int i = 0; i <= p; i++)
                close(in[i][1]);
            close(answers[0]);
            holder(share, orders[0], answers[1]);
        }
        close(orders[0]);
    }
    close(answers[1]);
    for (char line[64]; fgets(line, sizeof line, stdin);) {
        int total = 0, good;
        for (int p = 0; p < processes; p++)
            if (write(in[p][1], "?", 1) != 1)
                die("write");
        for (int p = 0; p < processes; p++) {
            if (read(answers[0], &good, sizeof good) != sizeof good)
                complain("a process has ended");
            total += good;
        }
        printf("%d\n", total);
        fflush(stdout);
    }
    for (int p = 0; p < processes; p++)
        close(in[p][1]);
    while (wait(NULL) > 0) {
    }
}

int main(int argc, char **argv) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    const char *mode = argc > 2 ? argv[2] : "";
    address = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "ask") && argc == 7)
        ask(atoi(argv[3]), atof(argv[4]), !strcmp(argv[5], "prepared"), argv[6]);
    else if (!strcmp(mode, "come") && argc == 5)
        come(atof(argv[3]), argv[4]);
    else if (!strcmp(mode, "rows") && argc == 5)
        rows(atof(argv[3]), argv[4]);
    else if (!strcmp(mode, "copy") && argc == 7)
        copy(atof(argv[3]), atoi(argv[4]), atoi(argv[5]), argv[6]);
    else if (!strcmp(mode, "hold") && argc == 5)
        hold(atoi(argv[3]), atoi(argv[4]));
    else {
        fprintf(stderr, "usage: client ADDRESS ask|come|rows|copy|hold …\n");
        return 2;
    }
    return 0;
}
