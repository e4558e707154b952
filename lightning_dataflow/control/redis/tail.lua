
-- Every change is made once, however often its request arrives: the run remembers the last request of each client, and when it
-- came. One whose acknowledged request is unknown tells that the server lost what it had written; one of an earlier term, that
-- another trainer has claimed the run.
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
if not known then  -- of processes that died nobody else speaks
  for name, text in pairs(hash(CLIENTS)) do
    if tonumber(string.match(text, '^%d+ (%d+)')) < time - KEEP_S then
      redis.call('HDEL', CLIENTS, name)
    end
  end
end
local reply = cjson.encode(ops[op](unpack(ARGV, 7, REST - 1)))
redis.call('HSET', CLIENTS, client, ARGV[3] .. ' ' .. int(time) .. ' ' .. reply)
if redis.call('HGET', TOTALS, 'finished') == 'completed' then  -- the last to leave removes everything; if it died, Redis does
  for _, key in ipairs(KEYS) do
    if redis.call('TTL', key) == -1 then
      redis.call('EXPIRE', key, KEEP_S)
    end
  end
end
return reply
