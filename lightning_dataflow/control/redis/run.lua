-- The ledger's operations on the run and its processes. PARTS: name → what a process said last, as JSON.

local function forget_parts(silent_s, and_failed)
  local oldest, flat = now() - silent_s, redis.call('HGETALL', PARTS)
  for i = 1, #flat, 2 do
    local part = decode(flat[i + 1], 'report of ' .. flat[i], {'seen'})
    if part.seen < oldest or (and_failed and part.failed) then
      redis.call('HDEL', PARTS, flat[i])
    end
  end
end

local function forget_samples()
  redis.call('DEL', SAMPLES, OPEN)
end

function ops.fence()
  redis.call('HDEL', TOTALS, 'plan')
  local wanted = redis.call('ZRANGE', OPEN, 0, -1)
  for i, seq in ipairs(wanted) do
    local row = get(seq)
    if row.state == 'leased' then
      want(seq, row)
    end
    wanted[i] = {seq, get(seq).attempt}
  end
  return wanted
end

-- samples: lists of seq and row
function ops.begin(plan, start, step, frontier, silent_s, samples)
  forget_samples()
  local bytes = 0
  for _, sample in ipairs(samples) do
    local seq, row = unpack(sample)
    put(seq, row)
    bytes = bytes + row.bytes
  end
  forget_parts(silent_s, true)
  redis.call('HDEL', TOTALS, 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'plan', plan, 'frontier', frontier, 'bytes_in_flight', bytes, 'trained_seq', start,
    'trained_step', step, 'paused', 0)
  for _, key in ipairs(KEYS) do
    redis.call('PERSIST', key)
  end
  return true
end

function ops.count_wait()
  redis.call('HINCRBY', TOTALS, 'train_waits', 1)
  return true
end

function ops.finish(status)
  forget_samples()
  redis.call('HSET', TOTALS, 'finished', status, 'finished_at', string.format('%.6f', now()), 'bytes_in_flight', 0)
  return true
end

-- part: host, pid, pids, state, failed and fatal
function ops.report(name, part)
  part.seen = now()
  if redis.call('HSET', PARTS, name, cjson.encode(part)) == 1 then
    forget_parts(KEEP_S)
  end
  return true
end

-- host, pid: of the process that last reported that name; '' and 0 for none
function ops.claim(name, part, host, pid)
  local text = redis.call('HGET', PARTS, name)
  local last = text and decode(text, 'report of ' .. name, {'pid', 'seen'}) or {host = '', pid = 0}
  if last.host ~= host or last.pid ~= pid then
    return false
  end
  redis.call('HDEL', TOTALS, 'plan', 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'claimed_by', string.format('process %d on %s', part.pid, part.host))
  ops.report(name, part)
  return tostring(redis.call('HINCRBY', TOTALS, 'term', 1))
end
