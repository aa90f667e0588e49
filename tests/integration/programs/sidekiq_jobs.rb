# Jobs of one worker, run by Sidekiq in three threads, all of which use one connection. They are put into the queue when
# it has started.
require "sidekiq"
require "pg"

CONNECTION = PG.connect

class Report
  include Sidekiq::Worker
  sidekiq_options retry: false

  def perform(_number)
    total
  end

  def total
    CONNECTION.exec("SELECT pg_sleep(0.2)")
  end
end

Sidekiq.configure_server do |config|
  config.on(:startup) { 12.times { |number| Report.perform_async(number) } }
end
