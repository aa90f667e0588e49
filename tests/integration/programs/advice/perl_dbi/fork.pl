# A child that works with what its parent has connected, and then goes its way.
use strict;
use warnings;
use DBI;

our ($dsn, $user, $password) = ('dbi:Pg:', $ENV{PGUSER}, '');
our $dbh = DBI->connect($dsn, $user, $password, { RaiseError => 1 });

sub work { $dbh->selectrow_array('SELECT 42') == 42 or die }

# here goes the advice, in the place of
my $pid = fork() // die "fork: $!";
if ($pid == 0) {
    work();
    exit 0;
}
# up to here
waitpid $pid, 0;
work();
$dbh->disconnect;
