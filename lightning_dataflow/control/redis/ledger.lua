-- The ledger's operations on samples; what they mean is MetadataStore's contract. rows: seq → "state attempt tries bytes rest",
-- where rest is the lease of a leased sample and the generation of a published one. wanted: seqs by seq. A lease is called
-- "first-seq-of-its-group worker"; leased: leases by the millisecond at which they end; holders: lease → all seqs that it may hold.

local function parse(text)
  local state, attempt, tries, bytes, rest = string.match(text, '^(%a+) (%d+) (%d+) (%d+) (.*)$')
  return {state = state, attempt = tonumber(attempt), tries = tonumber(tries), bytes = tonumber(bytes), rest = rest}
end

-- rows of seqs as they are kept, in their order; false where there is none
local function texts_of(seqs)
  if #seqs > 0 and #seqs <= MOST then
    return redis.call('HMGET', ROWS, unpack(seqs))
  end
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
  local freed, wanted = 0, {}
  for i, text in ipairs(texts_of(seqs)) do
    if text then
      local state, bytes = string.match(text, '^(%a+) %d+ %d+ (%d+)')
      freed = freed + bytes
      if state == 'wanted' then
        wanted[#wanted + 1] = seqs[i]
      end
    end
  end
  many('HDEL', ROWS, seqs)
  many('ZREM', WANTED, wanted)
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(0 - freed))
end

local function give_up(seqs)
  if #seqs > 0 then
    drop(seqs)
    redis.call('HINCRBY', TOTALS, 'given_up', #seqs)
  end
end

local function is_held(row, lease, attempt)
  return row and row.state == 'leased' and row.rest == lease and row.attempt == attempt
end

-- settles what a lease still holds: returns its seqs; one that holds nothing is over
local function settle(lease)
  local seqs, held = {}, {}
  for seq in string.gmatch(redis.call('HGET', HOLDERS, lease) or '', '%d+') do
    seqs[#seqs + 1] = seq
  end
  for i, row in ipairs(rows_of(seqs)) do
    if row and row.state == 'leased' and row.rest == lease then
      held[#held + 1] = seqs[i]
    end
  end
  if #held == 0 then
    redis.call('HDEL', HOLDERS, lease)
    redis.call('ZREM', LEASED, lease)
  end
  return held
end

local function finished()
  return redis.call('HGET', TOTALS, 'finished')
end

local function milliseconds(seconds)
  return string.format('%.0f', seconds * 1000)
end

local function first_open(time)
  local first = redis.call('ZRANGE', WANTED, 0, 0)[1]
  local lowest = first and tonumber(first)
  for _, lease in ipairs(redis.call('ZRANGEBYSCORE', LEASED, '-inf', '(' .. time)) do
    for _, seq in ipairs(settle(lease)) do
      if not lowest or tonumber(seq) < lowest then
        lowest = tonumber(seq)
      end
    end
  end
  return lowest
end

local function must_wait(seq, bytes, num_new, window, high_bytes, high_refs, low_bytes, low_refs)
  local totals = redis.call('HMGET', TOTALS, 'bytes_in_flight', 'paused', 'trained_seq')
  local in_bytes, in_refs = tonumber(totals[1] or 0), redis.call('HLEN', ROWS)
  local fits = in_bytes + bytes <= high_bytes and in_refs + num_new <= high_refs
  local low = in_bytes <= low_bytes and in_refs <= low_refs
  local was_paused = totals[2] == '1'
  local paused = not fits or (was_paused and not low)
  if paused ~= was_paused then
    redis.call('HINCRBY', TOTALS, 'capture_waits', paused and 1 or 0)
    redis.call('HSET', TOTALS, 'paused', paused and 1 or 0)
  end
  if seq < tonumber(totals[3] or 0) + window then  -- the trainer waits for it
    local lost = num_new == 0  -- of a resumed run; what survived must not keep it out
    return not fits and not lost
  end
  return paused
end

-- list: sizes of the seqs of the group that the caller expects, the first of which is `expected`. Another group's are asked for.
ops.lease = function(worker, group, lease_s, high_bytes, high_refs, low_bytes, low_refs, expected)
  local totals = redis.call('HMGET', TOTALS, 'plan', 'finished_at', 'frontier')
  if totals[2] then
    return {reason = 'finished', plan = totals[1] or nil, finished_at = totals[2]}
  end
  if not totals[1] then
    return {reason = 'not begun'}
  end
  local plan, time, frontier = cjson.decode(totals[1]), now(), tonumber(totals[3] or 0)
  local seq = first_open(milliseconds(time))
  if not seq then
    seq = frontier
    if seq >= plan.stop then
      return {reason = 'nothing left', plan = totals[1]}
    end
  end
  group = tonumber(group)
  local low = math.floor(seq / group) * group
  local high = math.min(low + group, plan.stop)
  local names, known, lease = {}, {}, int(low) .. ' ' .. worker
  for one = low, high - 1 do
    names[#names + 1] = int(one)
    if one < frontier then
      known[#known + 1] = names[#names]
    end
  end
  local is_sized = tonumber(expected) == low and #ARGV - REST + 1 == high - low
  local rows, seqs, taken, bytes, num_unreserved = rows_of(known), {}, {}, 0, #names - #known
  local num_new = num_unreserved
  for i = 1, #known do
    local row, is_open = rows[i], false
    if row and row.state == 'leased' then
      is_open = tonumber(redis.call('ZSCORE', LEASED, row.rest) or 0) < time * 1000
    elseif row then
      is_open = row.state == 'wanted'
    end
    if is_open then
      seqs[#seqs + 1], taken[#taken + 1] = known[i], row
      if row.bytes == 0 then
        num_unreserved, row.size = num_unreserved + 1, tonumber(ARGV[REST + i - 1])
        bytes = bytes + (row.size or 0)
      end
    end
  end
  if num_unreserved > 0 then
    if not is_sized then
      return {low = int(low), high = int(high), plan = totals[1]}
    end
    for i = #known + 1, #names do
      bytes = bytes + ARGV[REST + i - 1]
    end
    if must_wait(seq, bytes, num_new, plan.window, tonumber(high_bytes), tonumber(high_refs), tonumber(low_bytes),
        tonumber(low_refs)) then
      return {reason = 'paused', plan = totals[1]}
    end
    redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(bytes))
    if num_new > 0 then
      redis.call('HSET', TOTALS, 'frontier', int(high))
    end
  end
  local first = tonumber(seqs[1] or names[#known + 1])
  local last = num_new > 0 and high - 1 or tonumber(seqs[#seqs])
  local attempt, tries = 0, 0
  for i, row in ipairs(rows) do  -- those in between that another lease holds count too
    if row and row.state ~= 'published' and low + i - 1 >= first and low + i - 1 <= last then
      attempt = math.max(attempt, row.attempt + (row.state == 'leased' and 1 or 0))
    end
  end
  for _, row in ipairs(taken) do
    row.tries = row.tries + (row.state == 'leased' and 1 or 0)
    tries = math.max(tries, row.tries)
    row.state, row.attempt, row.rest, row.bytes = 'leased', attempt, lease, row.size or row.bytes
  end
  put(seqs, taken)
  many('ZREM', WANTED, known)
  local pairs, of = {}, 'leased ' .. int(attempt) .. ' 0 '
  for i = #known + 1, #names do
    seqs[#seqs + 1] = names[i]
    pairs[#pairs + 1] = names[i]
    pairs[#pairs + 1] = of .. ARGV[REST + i - 1] .. ' ' .. lease
  end
  many('HSET', ROWS, pairs)
  redis.call('ZADD', LEASED, milliseconds(time + lease_s), lease)
  local held = table.concat(seqs, ' ')
  local before = redis.call('HGET', HOLDERS, lease)
  redis.call('HSET', HOLDERS, lease, before and before .. ' ' .. held or held)
  return {low = int(low), high = int(high), plan = totals[1], wanted = #seqs == high - low or seqs, attempt = attempt,
    tries = tries}
end

ops.renew = function(worker, lease_s)
  local ends = milliseconds(now() + lease_s)
  for _, lease in ipairs(redis.call('HKEYS', HOLDERS)) do
    if string.match(lease, '^%d+ (.*)$') == worker and #settle(lease) > 0 then
      redis.call('ZADD', LEASED, ends, lease)
    end
  end
  return true
end

-- heads: of skip records of all seqs; list: seqs of the lease, then chunks of the records
ops.give_back = function(nonce, lease, attempt, retryable, counts, most, heads)
  local count = #heads / HEAD
  local seqs, lost, chosen, again, rows = listed(1, 1, count), {}, {}, {}, {}
  for i, row in ipairs(rows_of(seqs)) do
    if is_held(row, lease, tonumber(attempt)) then
      row.tries = row.tries + tonumber(counts)
      if retryable == '1' and row.tries < tonumber(most) then
        row.state, row.attempt, row.rest = 'wanted', row.attempt + 1, ''
        again[#again + 1], rows[#rows + 1] = seqs[i], row
      else
        lost[#lost + 1], chosen[#chosen + 1] = seqs[i], i
      end
    end
  end
  put(again, rows)
  want_all(again)
  give_up(lost)
  settle(lease)
  if #lost > 0 then
    append(nonce, cut(heads, listed(1, count + 1), chosen))
  end
  return lost
end

-- total: of the bytes of all samples; heads: of their records; list: seq and "bytes generation" of each sample, then chunks
ops.commit = function(nonce, lease, attempt, total, heads)
  if finished() then
    return {}
  end
  local count = #heads / HEAD
  local seqs, chunks = listed(2, 1, 2 * count), listed(1, 2 * count + 1)
  local chosen, accepted, pairs, reserved = {}, {}, {}, 0
  for i, text in ipairs(texts_of(seqs)) do
    local of, tries, bytes, holder
    if text then
      of, tries, bytes, holder = string.match(text, '^leased (%d+) (%d+) (%d+) (.*)$')
    end
    if of == attempt and holder == lease then  -- is_held, in the digits as they are
      local n = #accepted + 1
      reserved = reserved + bytes
      chosen[n], accepted[n] = i, seqs[i]
      pairs[2 * n - 1], pairs[2 * n] = seqs[i], 'published ' .. of .. ' ' .. tries .. ' ' .. ARGV[REST + 2 * i - 1]
    end
  end
  if #accepted == 0 then
    settle(lease)
    return {}
  end
  if #accepted < #seqs then
    total = 0
    for n, i in ipairs(chosen) do
      total = total + string.match(ARGV[REST + 2 * i - 1], '^%d+')
    end
    heads, chunks = cut(heads, chunks, chosen)
  end
  append(nonce, heads, chunks)
  many('HSET', ROWS, pairs)
  if redis.call('HGET', HOLDERS, lease) == table.concat(accepted, ' ') then
    redis.call('HDEL', HOLDERS, lease)
    redis.call('ZREM', LEASED, lease)
  else
    settle(lease)
  end
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', int(total - reserved))
  redis.call('HINCRBY', TOTALS, 'published', #accepted)
  if attempt ~= '0' then
    redis.call('HINCRBY', TOTALS, 'recaptured', #accepted)
  end
  return #accepted == #seqs or accepted
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
