-- The ledger's operations; what they mean is MetadataStore's contract. rows: seq → "state attempt tries bytes rest", where
-- rest is the worker of a leased sample and the generation of a published one. wanted: seqs by seq; leased: seqs by when their
-- lease ends. holders: worker → all seqs that it may hold.

local function parse(text)
  local state, attempt, tries, bytes, rest = string.match(text, '^(%a+) (%d+) (%d+) (%d+) (.*)$')
  return {state = state, attempt = tonumber(attempt), tries = tonumber(tries), bytes = tonumber(bytes), rest = rest}
end

-- rows of seqs as they are kept, in their order; false where there is none
local function texts_of(seqs)
  local texts = {}
  for first = 1, #seqs, MOST do
    for _, text in ipairs(redis.call('HMGET', ROWS, unpack(seqs, first, math.min(first + MOST - 1, #seqs)))) do
      texts[#texts + 1] = text
    end
  end
  return texts
end

local function rows_of(seqs)
  local rows = texts_of(seqs)
  for i, text in ipairs(rows) do
    rows[i] = text and parse(text)
  end
  return rows
end

-- seqs that a worker holds
local function held_by(worker)
  local seqs, held = {}, {}
  for seq in string.gmatch(redis.call('HGET', HOLDERS, worker) or '', '%d+') do
    seqs[#seqs + 1] = seq
  end
  local rows = rows_of(seqs)
  for i, seq in ipairs(seqs) do
    if rows[i] and rows[i].state == 'leased' and rows[i].rest == worker then
      held[#held + 1] = seq
    end
  end
  return held
end

local function put(seqs, rows)
  local pairs = {}
  for i, row in ipairs(rows) do
    pairs[2 * i - 1] = seqs[i]
    pairs[2 * i] = string.format('%s %d %d %d %s', row.state, row.attempt, row.tries, row.bytes, row.rest)
  end
  many('HSET', ROWS, pairs)
end

local function want_all(seqs)
  local pairs = {}
  for i, seq in ipairs(seqs) do
    pairs[2 * i - 1], pairs[2 * i] = seq, seq
  end
  many('ZADD', WANTED, pairs)
end

local function drop(seqs)
  local freed, indexed = 0, {}
  for i, text in ipairs(texts_of(seqs)) do
    if text then
      local state, bytes = string.match(text, '^(%a+) %d+ %d+ (%d+)')
      freed = freed + bytes
      if state ~= 'published' then
        indexed[#indexed + 1] = seqs[i]
      end
    end
  end
  many('HDEL', ROWS, seqs)
  many('ZREM', WANTED, indexed)
  many('ZREM', LEASED, indexed)
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(0 - freed))
end

local function give_up(seqs)
  if #seqs > 0 then
    drop(seqs)
    redis.call('HINCRBY', TOTALS, 'given_up', #seqs)
  end
end

local function is_held(row, worker, attempt)
  return row and row.state == 'leased' and row.rest == worker and row.attempt == attempt
end

local function finished()
  return redis.call('HGET', TOTALS, 'finished')
end

-- seq and value of each, one after the other
local function flat(seqs, value)
  local list = {}
  for i, seq in ipairs(seqs) do
    list[2 * i - 1], list[2 * i] = seq, value(i)
  end
  return list
end

-- parts that said nothing for so long
local function forget_parts(silent_s)
  local oldest = now() - silent_s
  for name, text in pairs(hash(PARTS)) do
    if tonumber(cjson.decode(text).seen) < oldest then
      redis.call('HDEL', PARTS, name)
      redis.call('HDEL', FAILED, name)
      redis.call('HDEL', HOLDERS, name)
    end
  end
end

local function forget_samples()
  redis.call('DEL', ROWS, WANTED, LEASED, HOLDERS)
end

ops.fence = function()
  local seqs = redis.call('ZRANGE', LEASED, 0, -1)
  local rows = rows_of(seqs)
  for _, row in ipairs(rows) do
    row.state, row.attempt, row.rest = 'wanted', row.attempt + 1, ''
  end
  put(seqs, rows)
  want_all(seqs)
  redis.call('DEL', LEASED, HOLDERS)
  redis.call('HDEL', TOTALS, 'plan')
  local wanted = redis.call('ZRANGE', WANTED, 0, -1)
  local found = rows_of(wanted)
  return flat(wanted, function(i) return int(found[i].attempt) end)
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

local function first_open(time)
  local first = redis.call('ZRANGE', WANTED, 0, 0)[1]
  local lowest = first and tonumber(first)
  for _, seq in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', '(' .. time)) do
    if not lowest or tonumber(seq) < lowest then
      lowest = tonumber(seq)
    end
  end
  return lowest
end

local function must_wait(seq, bytes, num_new, window, high_bytes, high_refs, low_bytes, low_refs)
  local in_bytes, in_refs = total('bytes_in_flight'), redis.call('HLEN', ROWS)
  local fits = in_bytes + bytes <= high_bytes and in_refs + num_new <= high_refs
  local low = in_bytes <= low_bytes and in_refs <= low_refs
  local was_paused = total('paused') == 1
  local paused = not fits or (was_paused and not low)
  if paused ~= was_paused then
    redis.call('HINCRBY', TOTALS, 'capture_waits', paused and 1 or 0)
    redis.call('HSET', TOTALS, 'paused', paused and 1 or 0)
  end
  if seq < total('trained_seq') + window then  -- the trainer waits for it
    local lost = num_new == 0  -- of a resumed run; what survived must not keep it out
    return not fits and not lost
  end
  return paused
end

-- list: sizes of the seqs of the group that the caller expects, the first of which is `expected`. Another group's are asked for.
ops.lease = function(worker, group, lease_s, high_bytes, high_refs, low_bytes, low_refs, expected)
  local plan = redis.call('HGET', TOTALS, 'plan')
  if not plan or finished() then
    return {}
  end
  plan = cjson.decode(plan)
  local time, frontier = now(), total('frontier')
  local seq = first_open(string.format('%.6f', time))
  if not seq then
    seq = frontier
    if seq >= plan.stop then
      return {}
    end
  end
  group = tonumber(group)
  local low = math.floor(seq / group) * group
  local high = math.min(low + group, plan.stop)
  local names, known = {}, {}
  for one = low, high - 1 do
    names[#names + 1] = int(one)
    if one < frontier then
      known[#known + 1] = names[#names]
    end
  end
  local rows, seqs, taken, bytes, num_new, num_unreserved = rows_of(known), {}, {}, 0, 0, 0
  for i, name in ipairs(names) do
    local row, is_open = rows[i], false
    if low + i - 1 >= frontier then
      row, is_open = {attempt = 0, tries = 0, bytes = 0}, true
      rows[i], num_new = row, num_new + 1
    elseif row and row.state == 'leased' then
      is_open = tonumber(redis.call('ZSCORE', LEASED, name)) < time
    elseif row then
      is_open = row.state == 'wanted'
    end
    if is_open then
      seqs[#seqs + 1], taken[#taken + 1] = name, row
      if row.bytes == 0 then
        num_unreserved, row.size = num_unreserved + 1, tonumber(ARGV[REST + i - 1])
        bytes = bytes + (row.size or 0)
      end
    end
  end
  if num_unreserved > 0 then
    if tonumber(expected) ~= low or #ARGV - REST + 1 ~= high - low then
      return {low = int(low), high = int(high), stop = int(plan.stop)}
    end
    if must_wait(seq, bytes, num_new, plan.window, tonumber(high_bytes), tonumber(high_refs), tonumber(low_bytes),
        tonumber(low_refs)) then
      return {}
    end
    redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(bytes))
    if num_new > 0 then
      redis.call('HSET', TOTALS, 'frontier', int(high))
    end
  end
  local first, last, attempt = tonumber(seqs[1]), tonumber(seqs[#seqs]), 0
  for i, row in ipairs(rows) do  -- those in between that another worker holds count too
    if row and row.state ~= 'published' and low + i - 1 >= first and low + i - 1 <= last then
      attempt = math.max(attempt, row.attempt + (row.state == 'leased' and 1 or 0))
    end
  end
  local tries, ends, expiries = 0, string.format('%.6f', time + lease_s), {}
  for i, row in ipairs(taken) do
    row.tries = row.tries + (row.state == 'leased' and 1 or 0)
    tries = math.max(tries, row.tries)
    row.state, row.attempt, row.rest, row.bytes = 'leased', attempt, worker, row.size or row.bytes
    expiries[2 * i - 1], expiries[2 * i] = ends, seqs[i]
  end
  put(seqs, taken)
  many('ZREM', WANTED, known)
  many('ZADD', LEASED, expiries)
  local held = table.concat(seqs, ' ')
  for _, one in ipairs(held_by(worker)) do
    if tonumber(one) < low or tonumber(one) >= high then
      held = held .. ' ' .. one
    end
  end
  redis.call('HSET', HOLDERS, worker, held)
  return {low = int(low), high = int(high), stop = int(plan.stop), wanted = #seqs == high - low or seqs, attempt = attempt,
    tries = tries}
end

ops.renew = function(worker, lease_s)
  local ends = string.format('%.6f', now() + lease_s)
  for _, seq in ipairs(held_by(worker)) do
    redis.call('ZADD', LEASED, ends, seq)
  end
  return true
end

-- list: seq and skip record of each sample of the lease
ops.give_back = function(nonce, worker, attempt, retryable, counts, most)
  local seqs, skips, lost, records, again, rows = listed(2, 1), listed(2, 2), {}, {}, {}, {}
  for i, row in ipairs(rows_of(seqs)) do
    if is_held(row, worker, tonumber(attempt)) then
      row.tries = row.tries + tonumber(counts)
      if retryable == '1' and row.tries < tonumber(most) then
        row.state, row.attempt, row.rest = 'wanted', row.attempt + 1, ''
        again[#again + 1], rows[#rows + 1] = seqs[i], row
      else
        lost[#lost + 1], records[#records + 1] = seqs[i], skips[i]
      end
    end
  end
  put(again, rows)
  many('ZREM', LEASED, again)
  want_all(again)
  give_up(lost)
  if #records > 0 then
    append(nonce, records)
  end
  return lost
end

-- list: seq, generation, bytes and record of each sample
ops.commit = function(nonce, worker, attempt)
  if finished() then
    return {}
  end
  local seqs, accepted, records, pairs, more = listed(4, 1), {}, {}, {}, 0
  for i, text in ipairs(texts_of(seqs)) do
    local of, tries, reserved, holder
    if text then
      of, tries, reserved, holder = string.match(text, '^leased (%d+) (%d+) (%d+) (.*)$')
    end
    if of == attempt and holder == worker then  -- is_held, in the digits as they are
      local at, n = REST + 4 * (i - 1), #accepted + 1
      local generation, bytes = ARGV[at + 1], ARGV[at + 2]
      more = more + bytes - reserved
      accepted[n], records[n] = seqs[i], ARGV[at + 3]
      pairs[2 * n - 1], pairs[2 * n] = seqs[i], 'published ' .. of .. ' ' .. tries .. ' ' .. bytes .. ' ' .. generation
    end
  end
  if #accepted == 0 then
    return {}
  end
  append(nonce, records)
  many('HSET', ROWS, pairs)
  many('ZREM', LEASED, accepted)
  if redis.call('HGET', HOLDERS, worker) == table.concat(accepted, ' ') then
    redis.call('HDEL', HOLDERS, worker)
  end
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(more))
  redis.call('HINCRBY', TOTALS, 'published', #accepted)
  if attempt ~= '0' then
    redis.call('HINCRBY', TOTALS, 'recaptured', #accepted)
  end
  return #accepted == #seqs or accepted
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

-- names and values of totals to set; list: the seqs to drop
ops.ack = function(...)
  local totals, seqs = {...}, listed(1, 1)
  if #totals > 0 then
    redis.call('HSET', TOTALS, ...)
  end
  if #seqs > 0 then
    drop(seqs)
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
