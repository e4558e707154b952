-- The log of a run in Redis, and what every script of a run begins with. All scripts get the same KEYS. Operations have
-- arguments of their own and, behind them in ARGV, from `REST` on, a list of any length.
local CARD, LINES, INDEX, TOTALS, CLIENTS, ROWS, WANTED, LEASED, HOLDERS, PARTS, FAILED = unpack(KEYS)
local MOST = 4000  -- arguments that fit on Lua's stack
local HEAD = 32  -- bytes of a record's head: see redis_records.py
local KEEP_S = 3600  -- what nobody needs any more stays that long
local REST = 7 + tonumber(ARGV[6])
local ops = {}

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function int(number)  -- concatenation would round above 1e14
  return string.format('%d', number)
end

-- every `step`th of the list, from its `first`th on
local function listed(step, first)
  local found = {}
  for i = REST + first - 1, #ARGV, step do
    found[#found + 1] = ARGV[i]
  end
  return found
end

-- a hash as a table
local function hash(key)
  local flat, found = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do
    found[flat[i]] = flat[i + 1]
  end
  return found
end

local function total(name)
  return tonumber(redis.call('HGET', TOTALS, name) or 0)
end

-- command KEY all of list, in pieces
local function many(command, key, list)
  for first = 1, #list, MOST do
    redis.call(command, key, unpack(list, first, math.min(first + MOST - 1, #list)))
  end
end

-- Each record is its head and its line. Their numbers in the log count up from 1, one entry of the index holds the heads of
-- one append; the nonce tells apart what two histories of one server wrote under one number.
local function append(nonce, heads, lines)
  local first, pairs = redis.call('HINCRBY', TOTALS, 'records', #lines) - #lines + 1, {}
  for i, line in ipairs(lines) do
    pairs[2 * i - 1], pairs[2 * i] = int(first + i - 1), line
  end
  many('HSET', LINES, pairs)
  redis.call('XADD', INDEX, int(first) .. '-' .. nonce, 'h', heads)
end

-- of heads, those of the records i
local function heads_of(heads, chosen)
  local found = {}
  for n, i in ipairs(chosen) do
    found[n] = string.sub(heads, HEAD * (i - 1) + 1, HEAD * i)
  end
  return table.concat(found)
end

-- list: lines
ops.append = function(nonce, heads)
  append(nonce, heads, listed(1, 1))
  return true
end

-- drops all records before one of the index
ops.trim = function(following)
  local first, numbers = total('trimmed') + 1, {}
  for number = first, following - 1 do
    numbers[#numbers + 1] = int(number)
  end
  many('HDEL', LINES, numbers)
  redis.call('XTRIM', INDEX, 'MINID', following .. '-0')
  redis.call('HSET', TOTALS, 'trimmed', math.max(first, following) - 1)
  return true
end
