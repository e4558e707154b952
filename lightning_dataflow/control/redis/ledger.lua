-- The ledger's operations on samples; MetadataStore says what they mean. SAMPLES: seq → its row as JSON: state (leased, wanted or
-- published), attempt, tries, bytes, and the worker of a leased one, the generation of a published one. OPEN: seqs that are not
-- published, by the end of their lease; the wanted ones come first, in order, below all times.
local BEFORE_TIME = 2 ^ 52

local function get(seq)
  local text = redis.call('HGET', SAMPLES, seq)
  return text and decode(text, 'row of sample ' .. seq, {'attempt', 'tries', 'bytes'})
end

local function put(seq, row, ends)
  redis.call('HSET', SAMPLES, seq, cjson.encode(row))
  if row.state == 'published' then
    redis.call('ZREM', OPEN, seq)
  else
    redis.call('ZADD', OPEN, ends or seq - BEFORE_TIME, seq)
  end
end

local function want(seq, row)
  put(seq, {state = 'wanted', attempt = row.attempt + 1, tries = row.tries, bytes = row.bytes})
end

local function drop(seqs)
  local freed = 0
  for _, seq in ipairs(seqs) do
    local row = get(seq)
    if row then
      freed = freed + row.bytes
      redis.call('HDEL', SAMPLES, seq)
      redis.call('ZREM', OPEN, seq)
    end
  end
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', 0 - freed)  -- Redis takes no -0
end

local function give_up(seqs)
  drop(seqs)
  redis.call('HINCRBY', TOTALS, 'given_up', #seqs)
end

local function is_held(row, worker, attempt)
  return row and row.state == 'leased' and row.worker == worker and row.attempt == attempt
end

local function finished()
  return redis.call('HGET', TOTALS, 'finished')
end

-- the lowest seq that is wanted, or whose lease has ended
local function first_open(time)
  local first = redis.call('ZRANGE', OPEN, 0, 0, 'WITHSCORES')
  local lowest = #first > 0 and tonumber(first[2]) < 0 and tonumber(first[1]) or nil
  for _, seq in ipairs(redis.call('ZRANGEBYSCORE', OPEN, 0, string.format('(%.17g', time))) do
    lowest = math.min(lowest or seq, seq)
  end
  return lowest
end

local function must_wait(seq, bytes, num_new, window, marks)
  local in_bytes, in_refs = total('bytes_in_flight', 0), redis.call('HLEN', SAMPLES)
  local fits = in_bytes + bytes <= marks.high_bytes and in_refs + num_new <= marks.high_refs
  local low = in_bytes <= marks.low_bytes and in_refs <= marks.low_refs
  local was_paused = redis.call('HGET', TOTALS, 'paused') == '1'
  local paused = not fits or (was_paused and not low)
  if paused ~= was_paused then
    redis.call('HINCRBY', TOTALS, 'capture_waits', paused and 1 or 0)
    redis.call('HSET', TOTALS, 'paused', paused and 1 or 0)
  end
  if seq < total('trained_seq', 0) + window then  -- the trainer waits for it
    local lost = num_new == 0  -- of a resumed run; what survived must not keep it out
    return not fits and not lost
  end
  return paused
end

-- first, sizes: the group that the caller expects to be next, and the bytes of its samples. Those of another are asked for.
function ops.lease(worker, group, lease_s, marks, first, sizes)
  local totals = redis.call('HMGET', TOTALS, 'plan', 'finished_at')
  local text, finished_at = totals[1] or nil, totals[2] or nil
  if finished_at or not text then
    return {reason = finished_at and 'finished' or 'not begun', plan = text, finished_at = finished_at}
  end
  local plan, time, frontier = decode(text, 'plan', {'start', 'stop', 'window'}), now(), total('frontier', 0)
  local seq = first_open(time) or frontier
  if seq >= plan.stop then
    return {reason = 'nothing left', plan = text}
  end
  local low = math.floor(seq / group) * group
  local stop = math.min(low + group, plan.stop)
  if first ~= low or #sizes ~= stop - low then
    return {plan = text, first = low, stop = stop}
  end
  local wanted, rows, attempt, tries, bytes, num_unreserved, num_new = {}, {}, 0, 0, 0, 0, 0
  for seq = low, stop - 1 do
    local row = seq < frontier and get(seq)
    if seq >= frontier then
      row, num_new = {state = 'wanted', attempt = 0, tries = 0, bytes = 0}, num_new + 1
    end
    if row and row.state ~= 'published' then
      local failed = row.state == 'leased' and 1 or 0  -- once its lease has ended
      attempt = math.max(attempt, row.attempt + failed)
      if seq >= frontier or tonumber(redis.call('ZSCORE', OPEN, seq)) < time then
        row.tries = row.tries + failed
        tries = math.max(tries, row.tries)
        if row.bytes == 0 then
          row.bytes, num_unreserved = sizes[seq - low + 1], num_unreserved + 1
          bytes = bytes + row.bytes
        end
        wanted[#wanted + 1], rows[#rows + 1] = seq, row
      end
    end
  end
  if num_unreserved > 0 and must_wait(seq, bytes, num_new, plan.window, marks) then
    return {reason = 'paused', plan = text}
  end
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', bytes)
  redis.call('HSET', TOTALS, 'frontier', math.max(frontier, stop))
  for i, row in ipairs(rows) do
    row.state, row.attempt, row.worker = 'leased', attempt, worker
    put(wanted[i], row, time + lease_s)
  end
  return {plan = text, first = low, stop = stop, wanted = wanted, attempt = attempt, tries = tries}
end

function ops.renew(worker, lease_s)
  local time = now()
  for _, seq in ipairs(redis.call('ZRANGEBYSCORE', OPEN, time, '+inf')) do
    if get(seq).worker == worker then
      redis.call('ZADD', OPEN, time + lease_s, seq)
    end
  end
  return true
end

-- skips: lists of a seq of the lease, and the record that skips it
function ops.give_back(worker, attempt, counts, most, skips)
  local lost, lines = {}, {}
  for _, skip in ipairs(skips) do
    local seq, row = skip[1], get(skip[1])
    if is_held(row, worker, attempt) then
      row.tries = row.tries + counts
      if row.tries < most then
        want(seq, row)
      else
        lost[#lost + 1], lines[#lines + 1] = seq, skip[2]
      end
    end
  end
  give_up(lost)
  ops.append(lines)
  return lost
end

-- entries: lists of seq, generation, bytes and record; without a generation ('') the sample is given up
function ops.commit(worker, attempt, entries)
  local accepted, lines, lost, change = {}, {}, {}, 0
  for _, entry in ipairs(finished() and {} or entries) do
    local seq, generation, bytes, line = unpack(entry)
    local row = get(seq)
    if is_held(row, worker, attempt) then
      if generation == '' then
        lost[#lost + 1] = seq
      else
        change = change + bytes - row.bytes
        put(seq, {state = 'published', attempt = attempt, tries = row.tries, bytes = bytes, generation = generation})
      end
      accepted[#accepted + 1], lines[#lines + 1] = seq, line
    end
  end
  ops.append(lines)
  give_up(lost)
  redis.call('HINCRBY', TOTALS, 'bytes_in_flight', change)
  redis.call('HINCRBY', TOTALS, 'published', #accepted - #lost)
  redis.call('HINCRBY', TOTALS, 'recaptured', attempt > 0 and #accepted - #lost or 0)
  return accepted
end

function ops.want(seq, generation, most)
  if finished() then
    return true
  end
  local row = get(seq)
  if not row then
    return false
  end
  if row.state ~= 'published' or row.generation ~= generation then
    return true  -- asked before
  end
  row.tries = row.tries + 1
  if row.tries >= most then
    give_up({seq})
    return false
  end
  want(seq, row)
  return true
end

function ops.update(totals, freed)
  for name, value in pairs(totals) do
    redis.call('HSET', TOTALS, name, value)
  end
  drop(freed)
  return true
end
