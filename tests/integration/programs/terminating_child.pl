# A parent connects and forks a child that never touches the connection.
# The child exits after as many seconds as the argument says: the destructor of its copy of the handle says goodbye
# to the server, with Terminate, on the parent's connection. AutoInactiveDestroy would have kept it from doing that.
# Says both processes, and whether the parent could go on.
use strict;
use warnings;
use DBI;

my ($life) = @ARGV;
my $connection = DBI->connect("dbi:Pg:", "", "", { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
$connection->selectrow_array("SELECT 1");

my $child = fork // die "fork: $!";
if ($child == 0) {
    select undef, undef, undef, $life;
    exit 0;
}
waitpid $child, 0;
select undef, undef, undef, 0.2;

my $alive = eval { $connection->selectrow_array("SELECT 1") } // 0;
print qq({"parent": $$, "child": $child, "alive": $alive}\n);
