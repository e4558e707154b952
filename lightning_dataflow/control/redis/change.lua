-- Runs one operation, once, however often its request arrives: the run remembers the last request of each client, and when it
-- came. A client whose acknowledged request is unknown learns that the server lost what it had written; a client of an earlier
-- term, that another trainer has claimed the run.
local client, acked, request, term, op = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local known = redis.call('HGET', CLIENTS, client)
local last = known and tonumber(string.match(known, '^%d+')) or 0
if last >= request then
  return string.match(known, '^%d+ %d+ (.*)$')
end
if last < acked then
  return redis.error_reply('LOST request ' .. ARGV[2] .. ' of ' .. client)
end
if term ~= '' and term ~= redis.call('HGET', TOTALS, 'term') then
  return redis.error_reply('TAKEN ' .. (redis.call('HGET', TOTALS, 'claimed_by') or 'nobody'))
end
local time = math.floor(now())
if not known then  -- a new process: forget those that died long ago
  local flat = redis.call('HGETALL', CLIENTS)
  for i = 1, #flat, 2 do
    if tonumber(string.match(flat[i + 1], '^%d+ (%d+)')) < time - KEEP_S then
      redis.call('HDEL', CLIENTS, flat[i])
    end
  end
end
local reply = cjson.encode(ops[op](unpack(cjson.decode(ARGV[6]))))
redis.call('HSET', CLIENTS, client, string.format('%s %d %s', ARGV[3], time, reply))
if redis.call('HGET', TOTALS, 'finished') == 'completed' then  -- the last to leave removes everything; if it died, Redis does
  for _, key in ipairs(KEYS) do
    redis.call('EXPIRE', key, KEEP_S, 'NX')
  end
end
return reply
