// Does steps with pgjdbc: see playing.py. JSON is no part of Java, so its steps come with tabs between their parts:
// number, kind, statement, and for a prepared one how many values it takes, and the values of each execution.
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.math.BigInteger;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Properties;

public class Steps {
    static String digest(ResultSet rows) throws Exception {
        MessageDigest hashed = MessageDigest.getInstance("MD5");
        int count = 0;
        int columns = rows.getMetaData().getColumnCount();
        while (rows.next()) {
            count++;
            for (int n = 1; n <= columns; n++) {
                hashed.update((rows.getString(n) + "\0").getBytes(StandardCharsets.UTF_8));
            }
        }
        return count + " rows " + new BigInteger(1, hashed.digest()).toString(16);
    }

    static String execute(Connection connection, String sql) throws Exception {
        try (Statement statement = connection.createStatement()) {
            return statement.execute(sql) ? digest(statement.getResultSet()) : String.valueOf(statement.getUpdateCount());
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }

    static String execute(PreparedStatement statement, String... values) throws Exception {
        for (int n = 0; n < values.length; n++) {
            statement.setString(n + 1, values[n]);
        }
        try (ResultSet rows = statement.executeQuery()) {
            return digest(rows);
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }

    static String unescaped(String text) {
        return text.replace("\\t", "\t").replace("\\n", "\n").replace("\\\\", "\\");
    }

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        properties.setProperty("sslmode", "disable");
        properties.setProperty("prepareThreshold", "3");
        String where = System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        try (Connection connection = DriverManager.getConnection("jdbc:postgresql://" + where, properties)) {
            String line;
            while ((line = input.readLine()) != null) {
                String[] step = line.split("\t", -1);
                StringBuilder got = new StringBuilder(step[0] + " " + step[1]);
                if (step[1].equals("big")) {
                    String value = step[3].repeat(Integer.parseInt(step[4]));
                    try (PreparedStatement statement = connection.prepareStatement(step[2])) {
                        got.append(" ").append(execute(statement, value, value));
                    }
                } else if (step[1].equals("prepared")) {
                    try (PreparedStatement statement = connection.prepareStatement(step[2])) {
                        int count = Integer.parseInt(step[3]);
                        for (int n = 4; n < step.length; n += count) {
                            String[] values = new String[count];
                            for (int m = 0; m < count; m++) {
                                values[m] = unescaped(step[n + m]);
                            }
                            got.append(" ").append(execute(statement, values));
                        }
                    }
                } else {
                    for (int n = 2; n < step.length; n++) {
                        got.append(" ").append(execute(connection, step[n]));
                    }
                }
                System.out.println(got);
            }
        }
    }
}
