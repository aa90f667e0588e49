# The scenario that the first argument names. last_user: A parent connects and forks a child, which asks something and exits:
# the destructor of its copy of the handle says goodbye to the server, with Terminate, on the parent's connection. daemon: The
# parent exits instead, likewise, and the child asks when it has. Says both processes, and whether who was left could go on.
use strict;
use warnings;
use DBI;

my ($scenario) = @ARGV;
my $connection = DBI->connect("dbi:Pg:", "", "", { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
$connection->selectrow_array("SELECT 1");
my $parent = $$;

my $child = fork // die "fork: $!";
if ($scenario eq "last_user") {
    if ($child == 0) {
        $connection->selectrow_array("SELECT 1");
        exit 0;
    }
    waitpid $child, 0;
} else {
    exit 0 if $child;
    select undef, undef, undef, 0.01 while getppid == $parent;
    $child = $$;
}
select undef, undef, undef, 0.2;

my $alive = eval { $connection->selectrow_array("SELECT 1") } // 0;
print qq({"parent": $parent, "child": $child, "alive": $alive}\n);
