-- The ledger's operations on the run and its parts, behind those on samples.

-- parts that said nothing for so long
local function forget_parts(silent_s)
  local oldest = now() - silent_s
  for name, text in pairs(hash(PARTS)) do
    if tonumber(cjson.decode(text).seen) < oldest then
      redis.call('HDEL', PARTS, name)
      redis.call('HDEL', FAILED, name)
    end
  end
end

local function forget_samples()
  redis.call('DEL', ROWS, WANTED, LEASED, HOLDERS)
end

ops.fence = function()
  for _, lease in ipairs(redis.call('HKEYS', HOLDERS)) do
    local seqs = settle(lease)
    local rows = rows_of(seqs)
    for _, row in ipairs(rows) do
      row.state, row.attempt, row.rest = 'wanted', row.attempt + 1, ''
    end
    put(seqs, rows)
    want_all(seqs)
  end
  redis.call('DEL', LEASED, HOLDERS)
  redis.call('HDEL', TOTALS, 'plan')
  local wanted, list = redis.call('ZRANGE', WANTED, 0, -1), {}
  for i, row in ipairs(rows_of(wanted)) do
    list[2 * i - 1], list[2 * i] = wanted[i], int(row.attempt)
  end
  return list
end

-- published: lists of seq, attempt, generation, bytes; wanted: of seq, attempt
ops.begin = function(plan, start, step, frontier, silent_s, published, wanted)
  forget_samples()
  local bytes, seqs, rows = 0, {}, {}
  for i, sample in ipairs(cjson.decode(published)) do
    seqs[i], rows[i] = sample[1], {state = 'published', attempt = sample[2], tries = 0, bytes = sample[4], rest = sample[3]}
    bytes = bytes + sample[4]
  end
  put(seqs, rows)
  seqs, rows = {}, {}
  for i, sample in ipairs(cjson.decode(wanted)) do
    seqs[i], rows[i] = sample[1], {state = 'wanted', attempt = sample[2], tries = 0, bytes = 0, rest = ''}
  end
  put(seqs, rows)
  want_all(seqs)
  local failed = redis.call('HKEYS', FAILED)
  many('HDEL', PARTS, failed)
  redis.call('DEL', FAILED)
  forget_parts(tonumber(silent_s))
  redis.call('HDEL', TOTALS, 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'plan', plan, 'frontier', frontier, 'bytes_in_flight', int(bytes), 'trained_seq', start,
    'trained_step', step, 'paused', 0)
  for _, key in ipairs(KEYS) do
    redis.call('PERSIST', key)
  end
  return true
end

ops.want = function(seq, generation, most)
  if finished() then
    return true
  end
  local row = rows_of({seq})[1]
  if not row then
    return false
  end
  if row.state ~= 'published' or row.rest ~= generation then
    return true  -- asked before
  end
  row.tries = row.tries + 1
  if row.tries >= tonumber(most) then
    give_up({seq})
    return false
  end
  row.state, row.attempt, row.rest = 'wanted', row.attempt + 1, ''
  put({seq}, {row})
  want_all({seq})
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

ops.report = function(name, host, pid, pids, state, failed)
  local part = {host = host, pid = tonumber(pid), pids = pids, seen = string.format('%.6f', now()), state = state,
    failed = tonumber(failed)}
  if redis.call('HSET', PARTS, name, cjson.encode(part)) == 1 then
    forget_parts(KEEP_S)
  end
  if failed == '0' then
    redis.call('HDEL', FAILED, name)
  else
    redis.call('HSET', FAILED, name, state)
  end
  return true
end

-- before_host, before_pid: of the last who reported that name; '' and 0 for nobody
ops.claim = function(name, host, pid, pids, state, before_host, before_pid)
  local text = redis.call('HGET', PARTS, name)
  local part = text and cjson.decode(text) or {host = '', pid = 0}
  if part.host ~= before_host or part.pid ~= tonumber(before_pid) then
    return false
  end
  redis.call('HDEL', TOTALS, 'plan', 'finished', 'finished_at')
  redis.call('HSET', TOTALS, 'claimed_by', 'process ' .. pid .. ' on ' .. host)
  ops.report(name, host, pid, pids, state, '0')
  return int(redis.call('HINCRBY', TOTALS, 'term', 1))
end
