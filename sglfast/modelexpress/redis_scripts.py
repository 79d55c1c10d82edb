"""The Lua that Redis runs for us: each script is one step that happens whole or not at all.

Runs in: Redis (or Valkey) 5 or newer; the text is sent by the metadata service. Contract: KEYS[1] is the base of all names, in
    braces, so that a cluster keeps them together.
    A state is text: `status updated_at_ms beats order source_load`, the last empty without a reading.

    base:version      counter; each change takes the next number
    base:changed      sorted set, member -> number of its last change
    base:gone         the same of deleted members, the newest _GONE_MAX; base:floor is the last number that was cut off
    base:static, base:state, base:payload_of    hashes by member; the payload is a hash of its own, base:payload:<id>
    base:epoch        random; another one means that the numbers began anew

A mirror asks with the last number it has seen and gets what is newer: a listing costs what has changed, not what there is.
"""

_GONE_MAX = 10_000

# ARGV: member, static, payload id, status, now. The payload was put down before, with a time to live that ends here.
PUBLISH = """
local base, member, payload = KEYS[1], ARGV[1], ARGV[3]
local updated = ARGV[5]
local old = redis.call('HGET', base .. ':state', member)
if old then
    local before = string.match(old, '^%S+ (%S+)')
    if tonumber(before) > tonumber(updated) then updated = before end
end
if redis.call('EXISTS', base .. ':payload:' .. payload) == 0 then
    return redis.error_reply('ERR the payload was lost before it was published')
end
redis.call('PERSIST', base .. ':payload:' .. payload)
local version = string.format('%.0f', redis.call('INCR', base .. ':version'))
local previous = redis.call('HGET', base .. ':payload_of', member)
if previous and previous ~= payload then redis.call('UNLINK', base .. ':payload:' .. previous) end
redis.call('HSET', base .. ':payload_of', member, payload)
redis.call('HSET', base .. ':static', member, ARGV[2])
redis.call('HSET', base .. ':state', member, table.concat({ARGV[4], updated, '0', version, ''}, ' '))
redis.call('ZREM', base .. ':gone', member)
redis.call('ZADD', base .. ':changed', version, member)
return version
"""

# ARGV: member, status, now, load, 1 to count a beat, mark that is expected or nothing. Returns the state before, or nil.
UPDATE = """
local base, member, now = KEYS[1], ARGV[1], ARGV[3]
local old = redis.call('HGET', base .. ':state', member)
if not old then return false end
local status, updated, beats, order = string.match(old, '^(%S+) (%S+) (%S+) (%S+)')
if ARGV[6] ~= '' and ARGV[6] ~= table.concat({status, updated, order}, ' ') then return false end
if tonumber(updated) > tonumber(now) then now = updated end
if ARGV[5] == '1' and tonumber(beats) < 2 then beats = string.format('%.0f', beats + 1) end
redis.call('HSET', base .. ':state', member, table.concat({ARGV[2], now, beats, order, ARGV[4]}, ' '))
redis.call('ZADD', base .. ':changed', redis.call('INCR', base .. ':version'), member)
return old
"""

# ARGV: member, mark that is expected. Returns 1 when it was deleted.
REMOVE = f"""
local base, member = KEYS[1], ARGV[1]
local old = redis.call('HGET', base .. ':state', member)
if not old then return 0 end
local status, updated, _, order = string.match(old, '^(%S+) (%S+) (%S+) (%S+)')
if ARGV[2] ~= table.concat({{status, updated, order}}, ' ') then return 0 end
local payload = redis.call('HGET', base .. ':payload_of', member)
if payload then redis.call('UNLINK', base .. ':payload:' .. payload) end
for _, name in ipairs({{':state', ':static', ':payload_of'}}) do redis.call('HDEL', base .. name, member) end
redis.call('ZREM', base .. ':changed', member)
redis.call('ZADD', base .. ':gone', redis.call('INCR', base .. ':version'), member)
local surplus = redis.call('ZCARD', base .. ':gone') - {_GONE_MAX}
if surplus > 0 then
    local cut = redis.call('ZRANGE', base .. ':gone', surplus - 1, surplus - 1, 'WITHSCORES')
    redis.call('SET', base .. ':floor', cut[2])
    redis.call('ZREMRANGEBYRANK', base .. ':gone', 0, surplus - 1)
end
return 1
"""

# ARGV: member, order. Returns head, tensors, is_legacy of the payload that this publish left, or nil.
PAYLOAD = """
local base, member = KEYS[1], ARGV[1]
local state = redis.call('HGET', base .. ':state', member)
local payload = redis.call('HGET', base .. ':payload_of', member)
if not state or not payload or string.match(state, '^%S+ %S+ %S+ (%S+)') ~= ARGV[2] then return false end
return redis.call('HMGET', base .. ':payload:' .. payload, 'head', 'tensors', 'is_legacy')
"""

# ARGV: epoch, last number seen (-1: nothing), epoch to set if there is none.
# Returns epoch, number, 1 if all is told anew, members gone, members changed, their statics, their states.
NEWS = """
local base, since = KEYS[1], tonumber(ARGV[2])
local epoch = redis.call('GET', base .. ':epoch')
if not epoch then
    epoch = ARGV[3]
    redis.call('SET', base .. ':epoch', epoch)
end
local version = redis.call('GET', base .. ':version') or '0'
local floor = redis.call('GET', base .. ':floor') or '0'
local all = since < 0 or epoch ~= ARGV[1] or since < tonumber(floor) or since > tonumber(version)
local from = all and '-inf' or string.format('(%.0f', since)
local gone = all and {} or redis.call('ZRANGEBYSCORE', base .. ':gone', from, '+inf')
local changed = redis.call('ZRANGEBYSCORE', base .. ':changed', from, '+inf')
local statics, states = {}, {}
for first = 1, #changed, 1000 do
    local last = math.min(first + 999, #changed)
    for _, value in ipairs(redis.call('HMGET', base .. ':static', unpack(changed, first, last))) do statics[#statics + 1] = value end
    for _, value in ipairs(redis.call('HMGET', base .. ':state', unpack(changed, first, last))) do states[#states + 1] = value end
end
return {epoch, version, all and 1 or 0, gone, changed, statics, states}
"""
