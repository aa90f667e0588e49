/* Two threads that call PQexec on one connection, without a lock.
 *
 * The second one finds a command in progress, and waits as well: for the first one's answer, which either may get.
 * Says its process and both threads' ids, as JSON, before it begins. Then anything may happen: answers are swapped,
 * libpq aborts, or a thread waits for ever for what the other has read; so it ends soon, whatever they do.
 */
#define _GNU_SOURCE
#include <libpq-fe.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROUNDS 2

static PGconn *connection;
static pthread_barrier_t barrier;

struct asker {
    pthread_t thread;
    long tid;
    useconds_t delay;
};

static void *ask(void *argument)
{
    struct asker *self = argument;

    self->tid = syscall(SYS_gettid);
    pthread_barrier_wait(&barrier); /* both are known */
    pthread_barrier_wait(&barrier); /* and have been announced */
    usleep(self->delay);
    for (int round = 0; round < ROUNDS; round++)
        PQclear(PQexec(connection, "SELECT pg_sleep(0.12)"));
    return NULL;
}

int main(void)
{
    struct asker first = {.delay = 0}, second = {.delay = 30000};

    connection = PQconnectdb("");
    if (PQstatus(connection) != CONNECTION_OK) {
        fputs(PQerrorMessage(connection), stderr);
        return 1;
    }
    pthread_barrier_init(&barrier, NULL, 3);
    pthread_create(&first.thread, NULL, ask, &first);
    pthread_create(&second.thread, NULL, ask, &second);
    pthread_barrier_wait(&barrier);
    printf("{\"pid\": %d, \"first\": %ld, \"second\": %ld}\n", getpid(), first.tid, second.tid);
    fflush(stdout);
    pthread_barrier_wait(&barrier);
    usleep(400000);
    _exit(0);
}
