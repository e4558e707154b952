-- What people are shown of a run, at one moment.
local TOTALS, ROWS, WANTED, LEASED, PUBLISHED, PARTS = KEYS[4], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[11]
local time = redis.call('TIME')
local trained = tonumber(redis.call('HGET', TOTALS, 'trained_seq') or 0)
local kept, kept_bytes = redis.call('ZRANGEBYSCORE', PUBLISHED, '-inf', '(' .. string.format('%.0f', trained)), 0
for _, seq in ipairs(kept) do
  local row = redis.call('HGET', ROWS, seq)
  kept_bytes = kept_bytes + tonumber(string.match(row, '^%a+ %d+ %d+ (%d+)'))
end
return cjson.encode({
  time = string.format('%.6f', tonumber(time[1]) + tonumber(time[2]) / 1e6),
  totals = redis.call('HGETALL', TOTALS),
  parts = redis.call('HGETALL', PARTS),
  refs = redis.call('HLEN', ROWS),
  leased = redis.call('ZCARD', LEASED),
  wanted = redis.call('ZCARD', WANTED),
  published = redis.call('ZCARD', PUBLISHED),
  kept = #kept,
  kept_bytes = string.format('%.0f', kept_bytes),
})
