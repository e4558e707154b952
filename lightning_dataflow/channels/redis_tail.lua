
-- Every change is made once, however often its request arrives: the run remembers the last request of each client. One whose
-- acknowledged request is unknown tells that the server lost what it had written.
local client, acked, request, op = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local known = redis.call('HGET', CLIENTS, client)
local last = known and tonumber(string.match(known, '^%d+')) or 0
if last >= request then
  return string.sub(known, string.find(known, ' ', 1, true) + 1)
end
if last < acked then
  return redis.error_reply('LOST request ' .. ARGV[2] .. ' of ' .. client)
end
local reply = cjson.encode(ops[op](unpack(ARGV, 5)))
redis.call('HSET', CLIENTS, client, ARGV[3] .. ' ' .. reply)
return reply
