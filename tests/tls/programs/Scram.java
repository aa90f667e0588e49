// Logs in with pgjdbc on each port that is named, with TLS or without: PORT:disable, or PORT:require.
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.Properties;

public class Scram {
    public static void main(String[] targets) {
        for (String target : targets) {
            String[] parts = target.split(":");
            Properties properties = new Properties();
            properties.setProperty("user", System.getenv("PGUSER"));
            properties.setProperty("password", System.getenv("PGPASSWORD"));
            properties.setProperty("sslmode", parts[1]);
            String url = "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + parts[0] + "/postgres";
            try (Connection connection = DriverManager.getConnection(url, properties)) {
                ResultSet result = connection.createStatement().executeQuery("SELECT 42");
                result.next();
                System.out.println(result.getInt(1));
            } catch (SQLException error) {
                System.out.println(error.getMessage().replace("\n", " "));
            }
        }
    }
}
