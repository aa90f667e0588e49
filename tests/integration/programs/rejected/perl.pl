# Connects with DBD::Pg once for each state that is named, and is rejected there; see python.py.
use strict;
use warnings;
use DBI;
use JSON::PP;

$| = 1;
$SIG{PIPE} = "IGNORE";
my $rows = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)";

sub arrived { print encode_json({ state => $_[0] }), "\n" }

for my $state (@ARGV) {
    my $connection = DBI->connect("dbi:Pg:", "", "", { RaiseError => 1, PrintError => 0, AutoCommit => 1 });
    my $passed = eval {
        $connection->begin_work, $connection->selectrow_array("SELECT 1") if $state eq "transaction";
        arrived($state) if $state ne "copy";
        <STDIN> if $state =~ /^(idle|transaction|torn)$/;
        if ($state eq "query") { $connection->selectrow_array("SELECT pg_sleep(60)") }
        elsif ($state eq "extended") { $connection->selectrow_array("SELECT pg_sleep(60), ?::int", undef, 1) }
        elsif ($state eq "rows") { $connection->selectall_arrayref($rows) }
        elsif ($state eq "copy") {
            $connection->do("COPY copied FROM STDIN");
            $connection->pg_putcopydata("1\n");
            arrived($state);
            <STDIN>;
            $connection->pg_putcopydata("2\n" x 1000) for 1 .. 3000;
            $connection->pg_putcopyend;
        }
        else { $connection->selectrow_array("SELECT 2") }
        1;
    };
    die "$state: it has not been rejected" if $passed;
    my %said = (class => ref($@) || "die", text => "$@", sqlstate => $connection->state);
    $said{again} = [map { eval { $connection->selectrow_array("SELECT 3"); 1 } ? undef : "$@" } 1 .. 3];
    print encode_json(\%said), "\n";
    eval { $connection->disconnect };
}
