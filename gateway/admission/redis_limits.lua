-- What one key's limits leave, asked and taken in one go. The clock is Redis's: gateways' own may differ.
--
-- KEYS[1]   the key's hash: requests, tokens (what is left of a minute) with the time of each (…_at), and
--           held:<gateway> = "<sequences> <order> <expires>"
-- ARGV      1 "ask": all or nothing, but for the request itself; "settle": whatever is left
--           2 requests a minute  3 requests to take    4 tokens a minute  5 tokens to take, or to give back
--           6 most sequences     7 held by this gateway already           8 sequences to hold
--           9 gateway           10 order of this call among its own      11 seconds after which it counts as dead
-- returns   what refuses ("" if nothing does), requests left, tokens left, sequences held
local LEAST = 1e-9

local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local must = ARGV[1] == 'settle'
local per_minute = {requests = tonumber(ARGV[2]), tokens = tonumber(ARGV[4])}
local wanted = {requests = tonumber(ARGV[3]), tokens = tonumber(ARGV[5])}
local most, own, sequences = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local field, order, lease = 'held:' .. ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11])

local state, written = {}, {}
local pairs_read = redis.call('HGETALL', KEYS[1])
for i = 1, #pairs_read, 2 do state[pairs_read[i]] = pairs_read[i + 1] end

local left, keep_s = {requests = 0, tokens = 0}, lease
for name, limit in pairs(per_minute) do
  if limit > 0 then
    left[name] = limit
    if state[name] then
      -- A clock that has been set back gives nothing and takes nothing.
      local gained = math.max(0, now - state[name .. '_at']) * limit / 60
      left[name] = math.min(limit, state[name] + gained)
    end
  end
end

-- Each gateway tells how many it holds, not by how many that changes: what is lost, or comes twice, does not add up.
local held = own
for name, value in pairs(state) do
  if name ~= field and name:sub(1, 5) == 'held:' then
    local count, expires = value:match('^(%S+) %S+ (%S+)$')
    if tonumber(expires) > now then held = held + count else redis.call('HDEL', KEYS[1], name) end
  end
end

local function find_refusal()
  if wanted.requests > 0 then
    if per_minute.tokens > 0 and left.tokens < LEAST then return 'tokens_per_minute' end
    if per_minute.requests > 0 then
      if left.requests < 1 then return 'requests_per_minute' end
      left.requests = left.requests - wanted.requests
    end
  end
  if most > 0 and sequences > 0 and held > 0 and held + sequences > most then return 'key_concurrency' end
  if wanted.tokens > 0 and left.tokens < wanted.tokens then return 'tokens_per_minute' end
  return ''
end

local refusal = ''
if must then
  left.requests = left.requests - wanted.requests
else
  refusal = find_refusal()
end
if refusal == '' then
  left.tokens = math.min(per_minute.tokens, left.tokens - wanted.tokens)
  local _, last = (state[field] or ''):match('^(%S+) (%S+)')
  if most > 0 and order > (tonumber(last) or 0) then
    written[#written + 1] = field
    written[#written + 1] = string.format('%d %d %.6f', own + sequences, order, now + lease)
  end
end

for name, limit in pairs(per_minute) do
  if limit > 0 then
    for _, one in ipairs({name, string.format('%.17g', left[name]), name .. '_at', string.format('%.6f', now)}) do
      written[#written + 1] = one
    end
    keep_s = math.max(keep_s, (limit - left[name]) * 60 / limit)
  end
end
if #written > 0 then redis.call('HSET', KEYS[1], unpack(written)) end
-- A full allowance need not be remembered.
keep_s = math.ceil(keep_s) + 60
if redis.call('TTL', KEYS[1]) < keep_s then redis.call('EXPIRE', KEYS[1], keep_s) end
return {refusal, string.format('%.6f', left.requests), string.format('%.6f', left.tokens), held}
