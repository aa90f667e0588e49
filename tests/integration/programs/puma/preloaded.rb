# Two workers, forked after the application has opened its pool: they share its connection.
bind "tcp://127.0.0.1:0"
workers 2
threads 5, 5
preload_app!
worker_shutdown_timeout 1
