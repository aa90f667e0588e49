# The same, but nothing is open when the workers are forked: each opens a pool of its own.
instance_eval File.read(File.join(__dir__, "preloaded.rb"))

before_fork { DB.disconnect }
