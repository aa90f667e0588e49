# frozen_string_literal: true

# What `pgguard run --ruby-stacks` has Ruby load as it starts, by RUBYOPT: a thread that tells pgguard, whenever it asks,
# what the threads of this process are doing. A thread that waits for PostgreSQL has given up the interpreter's lock, so
# the answer comes while it waits.
#
# pgguard asks through a named pipe, in a directory that belongs to its user and is closed to all others. Nothing is
# loaded for that, as what a program finds loaded changes what it does: Ruby's sockets come with io-wait, which may then
# be of another version than the one that Bundler wants.
#
# What the program itself could notice is kept from it:
# - Thread.list doesn't list this thread, so that nobody waits for it, or counts it before a fork.
# - It says nothing, catches what it raises, loads nothing, sets no handler, and ends with the process at once.
# - Ruby raises "No live threads left. Deadlock?" when all threads wait for each other, but not while one waits for a
#   pipe. So this thread looks every second whether all others do. If so, and if none has run for a second, it stops for
#   ever as well, and Ruby finds the deadlock.
#
# It does nothing in Ruby before 3.1, whose threads don't know their native ids, nor in JRuby and TruffleRuby.

if defined?(RUBY_ENGINE) && RUBY_ENGINE == "ruby" && Process.respond_to?(:_fork) && !defined?(PgguardRubyStacks)
  module PgguardRubyStacks
    DIRECTORY = ENV["PGGUARD_RUBY_STACKS_DIR"]
    NAME = "pgguard stacks" # of the thread, by which pgguard knows it: 15 bytes at most
    INTERVAL = 1 # seconds
    PAUSE = 0.1 # seconds
    QUESTIONS = 65_536 # bytes: all that the pipe holds
    PATIENCE = 0.5 # seconds for which an answer waits to be read
    CALLS = 256 # of one thread, the innermost ones
    TEXT = 1024 # bytes of a name
    ANSWER = 1_000_000 # bytes, but for the last thread's
    IDLE = 0.001 # seconds of processor time

    # Hides the thread from the program.
    module Hidden
      def list
        super.reject { |thread| thread.thread_variable_get(:pgguard) }
      end
    end

    # Begins anew in each child: a fork takes none of the other threads along.
    module Forked
      def _fork
        pid = super
        PgguardRubyStacks.start if pid == 0
        pid
      end

      def daemon(*)
        result = super
        PgguardRubyStacks.start
        result
      end
    end

    class << self
      def start
        forget
        return unless listen

        thread = Thread.start { attend }
        thread.thread_variable_set(:pgguard, true)
        thread.report_on_exception = false
        thread.name = NAME
        ThreadGroup.new.add(thread)
      rescue StandardError
        leave if thread.nil? # so that nobody waits for an answer
      end

      private

      # Opens the pipe that questions come through; false if pgguard isn't there any more.
      def listen
        return false unless File.directory?(DIRECTORY)

        namespace = File.readlink("/proc/self/ns/pid")[/\d+/]
        path = "#{DIRECTORY}/#{namespace}-#{Process.pid}"
        File.unlink(path) if File.exist?(path) # left behind by what this process was before exec, or by another one
        File.mkfifo(path, 0o600)
        pipe = IO.for_fd(IO.sysopen(path, File::RDWR | File::NONBLOCK), "r+b") # a pipe with a writer never ends
        @path = path
        @inode = pipe.stat.ino
        @pipe = pipe
        true
      end

      # Lets go of the pipe, unless somebody else has closed its descriptor, which may be another file's by now.
      def forget
        @answer.close if @answer # of a fork in the middle of it
        @answer = nil
        pipe = @pipe
        @pipe = nil
        return if pipe.nil?

        pipe.autoclose = same?(pipe)
        pipe.close
      end

      def same?(pipe)
        pipe.stat.ino == @inode
      rescue StandardError
        false
      end

      def attend
        8.times do
          break unless serve == :closed

          # Somebody has closed all descriptors, as what makes itself a daemon may do, and may not be done with it.
          sleep PAUSE
          forget
          break unless listen
        end
      rescue Exception
        nil
      ensure
        leave
      end

      def leave
        File.unlink(@path) if @pipe && same?(@pipe)
        forget
      rescue SystemCallError, IOError
        nil
      end

      # Answers until there is nobody to answer any more (:over), or the pipe isn't ours any more (:closed).
      def serve
        before = nil
        while true
          asked = IO.select([@pipe], nil, nil, INTERVAL)
          return :closed unless same?(@pipe)
          return :over if @pipe.stat.nlink == 0 # pgguard has ended

          if asked
            read = @pipe.read_nonblock(QUESTIONS, exception: false)
            read.split("\n").each { |question| answer(question) } if read.is_a?(String)
          else
            now = deadlocked? ? used : nil
            Thread.stop if before && now && now - before < IDLE
            before = now
          end
        end
      rescue IOError, SystemCallError
        :closed
      end

      def deadlocked?
        inspect = Thread.instance_method(:inspect)
        Thread.list.all? { |thread| thread.status == "sleep" && inspect.bind_call(thread).end_with?(" sleep_forever>") }
      end

      # The processor time of all other threads, in seconds.
      def used
        Process.clock_gettime(Process::CLOCK_PROCESS_CPUTIME_ID) - Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID)
      end

      # A question is the name of a pipe for the answer, and the native ids of the threads; without any, of all threads.
      def answer(question)
        name, *tids = question.split(" ")
        text = describe(tids)
        @answer = IO.for_fd(IO.sysopen("#{DIRECTORY}/#{File.basename(name)}", File::RDWR | File::NONBLOCK), "r+b")
        tell(@answer, "#{text.bytesize}\n".b + text)
      rescue SystemCallError, IOError
        nil # pgguard doesn't wait for it any more
      ensure
        @answer.close if @answer
        @answer = nil
      end

      # What is written to a pipe that is open for reading too is never refused, with a signal for one, as by SIGPIPE.
      def tell(pipe, text)
        until text.empty?
          written = pipe.write_nonblock(text, exception: false)
          if written.is_a?(Integer)
            text = text.byteslice(written..-1)
          elsif IO.select(nil, [pipe], nil, PATIENCE).nil?
            return
          end
        end
      end

      # Of each thread its native id, its name, the number of its calls, and of each call what, in which file and line.
      def describe(tids)
        main = Thread.main
        fields = [] # binary, as texts of different encodings can't be joined
        size = 0
        Thread.list.each do |thread|
          tid = thread.equal?(main) ? Process.pid : thread.native_thread_id
          next if tid.nil? || !(tids.empty? || tids.include?(tid.to_s))

          calls = thread.backtrace_locations(0, CALLS) || []
          said = [tid, thread.name, calls.size]
          calls.each { |call| said.push(call.label, call.absolute_path || call.path, call.lineno.to_i) }
          said.map! { |field| field.to_s.b.delete("\0").byteslice(0, TEXT) }
          fields.concat(said)
          size += said.sum(&:bytesize)
          break if size > ANSWER
        end
        fields.join("\0")
      end
    end

    if DIRECTORY && File.directory?(DIRECTORY)
      Thread.singleton_class.prepend(Hidden)
      Process.singleton_class.prepend(Forked)
      start
    end
  end
end
