/* The scenario that the first argument names. last_user: A parent connects and forks a child, which asks something and says
 * goodbye. daemon: The parent says goodbye and ends instead, and the child asks when it has. Says both processes, and whether
 * who was left could go on. */
#include <libpq-fe.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int ask(PGconn *connection)
{
    PGresult *result = PQexec(connection, "SELECT 1");
    int rows = PQntuples(result);

    PQclear(result);
    return rows;
}

int main(int argc, char **argv)
{
    PGconn *connection = PQconnectdb("");
    pid_t parent = getpid(), child;

    if (argc != 2 || ask(connection) != 1)
        return 1;
    child = fork();
    if (strcmp(argv[1], "last_user") == 0) {
        if (child == 0) {
            ask(connection);
            PQfinish(connection);
            return 0;
        }
        waitpid(child, NULL, 0);
    } else {
        if (child != 0) {
            PQfinish(connection);
            return 0;
        }
        while (getppid() == parent)
            usleep(10000);
        child = getpid();
    }
    usleep(200000);
    printf("{\"parent\": %d, \"child\": %d, \"alive\": %d}\n", (int)parent, (int)child, ask(connection));
    return 0;
}
