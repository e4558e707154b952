-- A process leaves the run. The last to leave a completed one removes it; those that were silent for ARGV[2] seconds have died.
local TOTALS, CLIENTS = KEYS[4], KEYS[5]
redis.call('HDEL', CLIENTS, ARGV[1])
if redis.call('HGET', TOTALS, 'finished') ~= 'completed' then
  return
end
local oldest = redis.call('TIME')[1] - ARGV[2]
for _, text in ipairs(redis.call('HVALS', CLIENTS)) do
  if tonumber(string.match(text, '^%d+ (%d+)')) > oldest then
    return
  end
end
redis.call('DEL', unpack(KEYS))
