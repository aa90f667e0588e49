/* Sends a query with libpq, and doesn't read the answer before it is told to go on, as a program does whose wait was
 * interrupted. Then it tries to send another one, and says what libpq thinks of that, as JSON.
 */
#include <libpq-fe.h>
#include <stdio.h>
#include <string.h>

int main(void)
{
    PGconn *connection = PQconnectdb("");
    char *text;

    if (PQstatus(connection) != CONNECTION_OK || !PQsendQuery(connection, "SELECT 1"))
        return 1;
    puts("{}");
    fflush(stdout);
    getchar();
    PQsendQuery(connection, "SELECT 2");
    text = PQerrorMessage(connection);
    text[strcspn(text, "\n")] = 0;
    printf("{\"error\": \"%s\"}\n", text);
    PQfinish(connection);
    return 0;
}
