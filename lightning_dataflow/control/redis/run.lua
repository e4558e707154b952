-- The ledger's operations on the run and its processes. PARTS: name → what a process said last, as JSON.

local function forget_parts(silent_s)
  local oldest, flat = now() - silent_s, redis.call('HGETALL', PARTS)
  for i = 1, #flat, 2 do
    if cjson.decode(flat[i + 1]).seen < oldest then
      redis.call('HDEL', PARTS, flat[i])
    end
  end
end

local function forget_samples()
  redis.call('DEL', SAMPLES, WANTED, LEASED)
end

ops.fence = function()
  for _, seq in ipairs(redis.call('ZRANGE', LEASED, 0, -1)) do
    want(seq, get(seq))
  end
  redis.call('HDEL', TOTALS, 'plan')
  local wanted = redis.call('ZRANGE', WANTED, 0, -1)
  for i, seq in ipairs(wanted) do
    wanted[i] = {seq, get(seq).attempt}
  end
  return wanted
end

-- published: lists of seq, attempt, generation, bytes; wanted: of seq, attempt
ops.begin = function(plan, start, step, frontier, silent_s, published, wanted)
  forget_samples()
  local bytes = 0
  for _, sample in ipairs(published) do
    put(sample[1], {state = 'published', attempt = sample[2], tries = 0, bytes = sample[4], generation = sample[3]})
    bytes = bytes + sample[4]
  end
  for _, sample in ipairs(wanted) do
    put(sample[1], {state = 'wanted', attempt = sample[2], tries = 0, bytes = 0})
  end
  local flat = redis.call('HGETALL', PARTS)
  for i = 1, #flat, 2 do
    if cjson.decode(flat[i + 1]).failed > 0 then
      redis.call('HDEL', PARTS, flat[i])
    end
  end
  forget_parts(silent_s)
  redis.call('HDEL', TOTALS, 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'plan', plan, 'frontier', frontier, 'bytes_in_flight', bytes, 'trained_seq', start,
    'trained_step', step, 'paused', 0)
  for _, key in ipairs(KEYS) do
    redis.call('PERSIST', key)
  end
  return true
end

ops.count_wait = function()
  redis.call('HINCRBY', TOTALS, 'train_waits', 1)
  return true
end

ops.finish = function(status)
  forget_samples()
  redis.call('HSET', TOTALS, 'finished', status, 'finished_at', string.format('%.6f', now()), 'bytes_in_flight', 0)
  return true
end

-- part: host, pid, pids, state and failed
ops.report = function(name, part)
  part.seen = now()
  if redis.call('HSET', PARTS, name, cjson.encode(part)) == 1 then
    forget_parts(KEEP_S)
  end
  return true
end

-- host, pid: of the process that last reported that name; '' and 0 for none
ops.claim = function(name, part, host, pid)
  local text = redis.call('HGET', PARTS, name)
  local last = text and cjson.decode(text) or {host = '', pid = 0}
  if last.host ~= host or last.pid ~= pid then
    return false
  end
  redis.call('HDEL', TOTALS, 'plan', 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'claimed_by', string.format('process %d on %s', part.pid, part.host))
  ops.report(name, part)
  return tostring(redis.call('HINCRBY', TOTALS, 'term', 1))
end
