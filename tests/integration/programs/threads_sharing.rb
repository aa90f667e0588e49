# Two threads that use one connection without a lock, which ruby-pg's documentation says must not be.
# Says its process and both threads' ids, as JSON, before it begins. Then anything may happen: answers are swapped, an
# exception, or a thread waits for ever for what the other has read; so it ends soon, whatever they do.
require "json"
require "pg"

ROUNDS = 2
Thread.report_on_exception = false # what goes wrong is for the guard to see

connection = PG.connect
tids = Queue.new
announced = Queue.new
threads = [0, 0.03].map do |delay|
  Thread.new do
    tids << Thread.current.native_thread_id
    announced.pop
    sleep delay
    ROUNDS.times { connection.exec("SELECT pg_sleep(0.12)") }
  end
end
puts JSON.generate({ pid: Process.pid, first: tids.pop, second: tids.pop })
$stdout.flush
2.times { announced << true }
sleep 0.4
exit! 0
