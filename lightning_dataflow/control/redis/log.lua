-- What every script of a run begins with, and the log's operations. All scripts get the same KEYS.
local CARD, NONCE, LOG, TOTALS, CLIENTS, SAMPLES, OPEN, PARTS = unpack(KEYS)
local SLICE = 1000  -- entries that are trimmed at a time: the server serves nobody else meanwhile
local KEEP_S = 3600  -- how long the remains of a completed run, and of processes that died, are kept
local MAX_TEXT = 1048576  -- bytes of a value that is parsed
local ops = {}

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function damaged(what)
  error({err = 'DAMAGED ' .. what})
end

-- a JSON object, whose fields `names` are numbers
local function decode(text, what, names)
  if #text > MAX_TEXT then
    damaged(what)
  end
  local ok, value = pcall(cjson.decode, text)
  if not ok or type(value) ~= 'table' then
    damaged(what)
  end
  for _, name in ipairs(names) do
    if type(value[name]) ~= 'number' then
      damaged(what .. ', field ' .. name .. ',')
    end
  end
  return value
end

-- a whole number of the run
local function total(name, otherwise)
  local text = redis.call('HGET', TOTALS, name)
  local value = tonumber(text or otherwise)
  if not value or value % 1 ~= 0 or value < 0 then
    damaged(name)
  end
  return value
end

-- Entries are called number-time. Numbers count up from 1. A server that lost some entries gives their numbers to others; by the
-- time, in microseconds, a reader that has read the lost ones notices.
function ops.append(lines)
  local last, time = redis.call('HINCRBY', TOTALS, 'records', #lines) - #lines, redis.call('TIME')
  for i, line in ipairs(lines) do
    redis.call('XADD', LOG, string.format('%d-%s%06d', last + i, time[1], time[2]), 'record', line)
  end
  return true
end

-- Drops entries before `position` up to the first that concerns `seq` or a later one, of at most SLICE; returns whether to go on.
function ops.trim(seq, position)
  local entries = redis.call('XRANGE', LOG, '-', position, 'COUNT', SLICE + 1)
  for i, entry in ipairs(entries) do
    if i == #entries or tonumber(string.match(entry[2][2], '"seq":(%d+)') or damaged('record ' .. entry[1])) >= seq then
      redis.call('XTRIM', LOG, 'MINID', entry[1])
      return i > SLICE
    end
  end
  return false
end
