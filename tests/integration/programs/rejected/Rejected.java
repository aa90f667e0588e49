// Connects with pgjdbc once for each state that is named, and is rejected there; see python.py.
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.SQLException;
import java.sql.Statement;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyIn;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

public class Rejected {
    static final BufferedReader INPUT = new BufferedReader(new InputStreamReader(System.in));
    static final String ROWS =
        "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)";

    static void arrived(String state) {
        System.out.println("{\"state\": " + json(state) + "}");
    }

    static String json(String text) {
        if (text == null) {
            return "null";
        }
        return "\"" + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n") + "\"";
    }

    static void execute(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    static String outcome(Connection connection) {
        try {
            execute(connection, "SELECT 3");
            return "null";
        } catch (SQLException error) {
            return json(error.getMessage());
        }
    }

    static void copy(Connection connection) throws SQLException, IOException {
        CopyIn copy = connection.unwrap(PGConnection.class).getCopyAPI().copyIn("COPY copied FROM STDIN");
        copy.writeToCopy("1\n".getBytes(), 0, 2);
        copy.flushCopy();
        arrived("copy");
        INPUT.readLine();
        byte[] lines = "2\n".repeat(1000).getBytes();
        for (int n = 0; n < 3000; n++) {
            copy.writeToCopy(lines, 0, lines.length);
        }
        copy.endCopy();
    }

    static void use(Connection connection, String state) throws SQLException, IOException {
        if (state.equals("transaction")) {
            connection.setAutoCommit(false);
            execute(connection, "SELECT 1");
        }
        if (!state.equals("copy")) {
            arrived(state);
        }
        switch (state) {
            case "query":
                execute(connection, "SELECT pg_sleep(60)");
                break;
            case "extended":
                try (PreparedStatement statement = connection.prepareStatement("SELECT pg_sleep(60), ?::int")) {
                    statement.setInt(1, 1);
                    statement.execute();
                }
                break;
            case "rows":
                execute(connection, ROWS);
                break;
            case "copy":
                copy(connection);
                break;
            default:
                INPUT.readLine();
                execute(connection, "SELECT 2");
        }
    }

    public static void main(String[] states) throws Exception {
        String host = System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        for (String state : states) {
            Connection connection =
                DriverManager.getConnection("jdbc:postgresql://" + host + "?user=" + System.getenv("PGUSER"));
            try {
                use(connection, state);
                throw new AssertionError(state + ": it has not been rejected");
            } catch (PSQLException error) {
                ServerErrorMessage server = error.getServerErrorMessage();
                System.out.println("{\"class\": " + json(error.getClass().getSimpleName())
                    + ", \"text\": " + json(error.getMessage())
                    + ", \"sqlstate\": " + json(error.getSQLState())
                    + ", \"detail\": " + json(server == null ? null : server.getDetail())
                    + ", \"hint\": " + json(server == null ? null : server.getHint())
                    + ", \"again\": [" + outcome(connection) + ", " + outcome(connection) + ", " + outcome(connection) + "]}");
            }
        }
    }
}
