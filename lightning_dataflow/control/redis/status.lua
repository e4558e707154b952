-- What people are shown of a run, at one moment.
local TOTALS, ROWS, WANTED, PARTS = KEYS[4], KEYS[6], KEYS[7], KEYS[10]
local time = redis.call('TIME')
local trained = tonumber(redis.call('HGET', TOTALS, 'trained_seq') or 0)
local rows, published, leased, kept, kept_bytes = redis.call('HGETALL', ROWS), 0, 0, 0, 0
for i = 1, #rows, 2 do
  local bytes = string.match(rows[i + 1], '^published %d+ %d+ (%d+)')
  if bytes then
    published = published + 1
    if tonumber(rows[i]) < trained then
      kept, kept_bytes = kept + 1, kept_bytes + bytes
    end
  elseif string.find(rows[i + 1], '^leased') then
    leased = leased + 1
  end
end
return cjson.encode({
  time = string.format('%.6f', tonumber(time[1]) + tonumber(time[2]) / 1e6),
  totals = redis.call('HGETALL', TOTALS),
  parts = redis.call('HGETALL', PARTS),
  refs = #rows / 2,
  leased = leased,
  wanted = redis.call('ZCARD', WANTED),
  published = published,
  kept = kept,
  kept_bytes = string.format('%d', kept_bytes),
})
