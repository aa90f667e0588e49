# Does steps with DBD::Pg: see playing.py.
use strict;
use warnings;
use DBI;
use Digest::MD5 qw(md5_hex);
use JSON::PP;

$| = 1;
my $json = JSON::PP->new->utf8->canonical;
my $connection = DBI->connect("dbi:Pg:", "", "", { RaiseError => 1, PrintError => 0, PrintWarn => 0, AutoCommit => 1 });
$SIG{__WARN__} = sub { };

sub execute {
    my ($sql, @values) = @_;
    my $statement = eval {
        my $prepared = $connection->prepare($sql);
        $prepared->execute(@values);
        $prepared;
    };
    return $connection->state unless $statement;
    my $rows = $statement->{NUM_OF_FIELDS} ? $statement->fetchall_arrayref : [];
    return { rows => scalar(@$rows), md5 => md5_hex($json->encode($rows)) };
}

while (my $line = <STDIN>) {
    my $step = $json->decode($line);
    my $got;
    if    ($step->{do} eq "prepared") { $got = [map { execute($step->{sql}, @$_) } @{ $step->{lists} }] }
    elsif ($step->{do} eq "big") { my $value = $step->{letter} x $step->{size}; $got = execute($step->{sql}, $value, $value) }
    else  { $got = execute($step->{sql}, @{ $step->{values} || [] }) }
    print $json->encode({ n => $step->{n}, do => $step->{do}, got => $got }), "\n";
}
$connection->disconnect;
